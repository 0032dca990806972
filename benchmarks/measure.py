"""One case: time of all contenders' steps in alternating order, peak memory, work, ratios to each other; its table."""

import contextlib
import gc
import io
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer  # wall time, after what a GPU still has to do
from tqdm import tqdm

from benchmarks import work
from benchmarks.contenders import SAME_LOSS, Contender, Setup, build
from rmipo import files, record

BASES = ("padded-rmipo", "padded-simpo", "simpo")
# Relative, between ways to compute the same loss.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def environment() -> dict:
    """Hardware, versions and commit of this run. Times mean little without the name of the CPU."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return record.environment() | {"cpu": names[0], "threads": torch.get_num_threads()}


def save(result: dict, path: Path) -> None:
    files.write_atomically(path, json.dumps(result, indent=1) + "\n")


def build_all(names: list[str], setup: Setup) -> dict[str, Contender]:
    """The contenders, which train the same weights, each through modules of its own."""
    weights = setup.model()
    with contextlib.redirect_stderr(io.StringIO()):  # TRL's own progress bars
        return {name: build(name, setup, weights) for name in names}


def run_case(
    contenders: dict[str, Contender], setup: Setup, batches: list[list[dict]], deadline: float = math.inf
) -> dict:
    """What `table` prints. A contender that runs out of memory is named and left out."""
    longest = max(batches, key=lambda pairs: work.step_work("padded-simpo", pairs, setup).positions)
    memory, too_large = {}, []
    for name, one in contenders.items():  # compilation and the allocator's growth come before the first round
        try:
            memory[name] = peak_memory(one, longest)
        except torch.OutOfMemoryError:
            too_large.append(name)
        one.model.zero_grad()
    rounds = timed_rounds({name: contenders[name] for name in memory}, batches, LOSS_TOLERANCE[setup.dtype], deadline)
    entries = {}
    for name, own in rounds.items():
        total = work.total(name, batches[: len(own)], setup)
        done = {"positions": total.positions, "flops": total.flops}
        entries[name] = {"name": name, "memory": memory[name], "work": done, "rounds": own}
    add_ratios(entries, setup.clock)
    return {"contenders": entries, "out_of_memory": too_large}


def timed_rounds(
    contenders: dict[str, Contender], batches: list[list[dict]], tolerance: float, deadline: float = math.inf
) -> dict[str, list[dict]]:
    """Time every contender on every batch: name -> one `{"cpu": seconds, "wall": seconds, "loss": value}` per batch.

    Odd rounds run in reverse order; none but the first starts after `deadline`, of `time.monotonic`. Raises RuntimeError where
    ways to compute the same loss differ by more than `tolerance`, relative.
    """
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    for number, pairs in enumerate(tqdm(batches, unit="round")):
        if number and time.monotonic() > deadline:
            break
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            gc.collect()
            wall, cpu = timer(), time.process_time()
            loss = contenders[name].step(pairs)
            wall, cpu = timer() - wall, time.process_time() - cpu
            contenders[name].model.zero_grad()
            results[name].append({"cpu": cpu, "wall": wall, "loss": loss})
        for names in SAME_LOSS:
            losses = {name: results[name][-1]["loss"] for name in names if name in results}
            values = losses.values()
            if losses and max(values) - min(values) > tolerance * max(map(abs, values)):
                raise RuntimeError(f"these should have the same loss: {losses}")
    return results


def peak_memory(one: Contender, pairs: list[dict]) -> int:
    """Bytes that a step needs beyond weights and gradients: what torch's allocator hands out at once."""
    one.step(pairs)  # the gradients are there
    if one.model.device.type == "cpu":
        return allocated_peak(lambda: one.step(pairs))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one.step(pairs)
    return torch.cuda.max_memory_allocated() - before


def allocated_peak(function: Callable[[], object]) -> int:
    """Bytes that torch's allocator on the CPU hands out at once while `function` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


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
