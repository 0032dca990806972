"""What was measured, where and with what; ratios; the printed table."""

import json
import re
import statistics
from pathlib import Path

import pandas as pd
import torch

from rmipo import record


def environment() -> dict:
    """Hardware, versions and commit of this run. Times mean little without the name of the CPU."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return record.environment() | {"cpu": names[0], "threads": torch.get_num_threads()}


def ratio(values: list[float], base: list[float]) -> dict[str, float]:
    """Min, median and max over rounds of `values / base`."""
    ratios = [a / b for a, b in zip(values, base, strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def add_ratios(case: dict, bases: tuple[str, ...], clock: str) -> None:
    """Write into each contender of `case` its time, its work and its memory relative to each of `bases`."""
    contenders = case["contenders"]
    for entry in contenders.values():
        entry["ratios"] = {}
        for base in (contenders[name] for name in bases if name in contenders):
            times = ratio(*([round_[clock] for round_ in one["rounds"]] for one in (entry, base)))
            entry["ratios"][base["name"]] = {
                "time": times,
                "positions": entry["work"]["positions"] / base["work"]["positions"],
                "flops": entry["work"]["flops"] / base["work"]["flops"],
                **({"memory": entry["memory"] / base["memory"]} if "memory" in entry else {}),
            }


def table(case: dict, clock: str) -> str:
    """One case as text: measured ratios beside those of the work model."""
    bases = list(next(iter(case["contenders"].values()))["ratios"])
    header = ["step", "s", "positions", "GFLOP", "GFLOP/s", *(f"/ {base} (work)" for base in bases), "MiB", "MiB /"]
    lines = []
    for entry in case["contenders"].values():
        seconds = [round_[clock] for round_ in entry["rounds"]]
        total, flops = sum(seconds), entry["work"]["flops"]
        cells = [entry["name"], f"{statistics.median(seconds):.3f}", str(entry["work"]["positions"])]
        cells += [f"{flops / 1e9:.0f}", f"{flops / 1e9 / total:.0f}"]
        for base in bases:
            r = entry["ratios"][base]
            cells.append("{min:.2f} {median:.2f} {max:.2f}".format(**r["time"]) + f" ({r['flops']:.2f})")
        memory = entry["ratios"][bases[0]].get("memory") if bases else None
        cells += [f"{entry['memory'] / 2**20:.0f}", f"{memory:.2f}"] if memory else ["", ""]
        lines.append(cells)
    return pd.DataFrame(lines, columns=header).to_string(index=False)


def save(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
