"""What was measured, where and with what; ratios; the printed table."""

import json
import re
import statistics
from pathlib import Path

import pandas as pd
import torch

from rmipo import record

BASES = ("padded-rmipo", "padded-simpo", "simpo")


def environment() -> dict:
    """Hardware, versions and commit of this run. Times mean little without the name of the CPU."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return record.environment() | {"cpu": names[0], "threads": torch.get_num_threads()}


def add_ratios(contenders: dict[str, dict], clock: str) -> None:
    """Write into each contender its time (min, median, max over rounds), FLOPs and memory relative to each base."""
    for entry in contenders.values():
        entry["ratios"] = {}
        for base in (contenders[name] for name in BASES if name in contenders):
            times = [own[clock] / other[clock] for own, other in zip(entry["rounds"], base["rounds"], strict=True)]
            entry["ratios"][base["name"]] = {
                "time": [min(times), statistics.median(times), max(times)],
                "flops": entry["work"]["flops"] / base["work"]["flops"],
                "memory": entry["memory"] / base["memory"],
            }


def table(contenders: dict[str, dict], clock: str) -> str:
    """One case as text: measured ratios beside those of the work model."""
    lines = []
    for entry in contenders.values():
        seconds, flops = [one[clock] for one in entry["rounds"]], entry["work"]["flops"]
        cells = {"step": entry["name"], "s": f"{statistics.median(seconds):.3f}"}
        cells |= {"positions": entry["work"]["positions"], "GFLOP": f"{flops / 1e9:.0f}"}
        cells["GFLOP/s"] = f"{flops / 1e9 / sum(seconds):.0f}"
        for base, ratios in entry["ratios"].items():
            cells[f"/ {base} (work)"] = "{:.2f} {:.2f} {:.2f} ".format(*ratios["time"]) + f"({ratios['flops']:.2f})"
            cells[f"MiB / {base}"] = f"{ratios['memory']:.2f}"
        lines.append(cells | {"MiB": f"{entry['memory'] / 2**20:.0f}"})
    return pd.DataFrame(lines).to_string(index=False)


def save(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
