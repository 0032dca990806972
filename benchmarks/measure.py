"""One case: time of all contenders' steps in alternating order, peak memory, work, and ratios to each other."""

import contextlib
import gc
import io
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks import report, work
from benchmarks.contenders import SAME_LOSS, Contender, Setup, build

# Relative, between ways to compute the same loss.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def build_all(names: list[str], setup: Setup) -> dict[str, Contender]:
    """The contenders, which train the same weights, each through modules of its own."""
    weights = setup.model()
    with contextlib.redirect_stderr(io.StringIO()):  # TRL's own progress bars
        return {name: build(name, setup, weights) for name in names}


def run_case(
    contenders: dict[str, Contender], setup: Setup, batches: list[list[dict]], deadline: float = math.inf
) -> dict:
    """What `report.table` prints. A contender that runs out of memory is named and left out."""
    longest = max(batches, key=lambda pairs: work.step_work("padded-simpo", pairs, setup).positions)
    memory, able, too_large = {}, {}, []
    for name, one in contenders.items():  # compilation and the allocator's growth come before the first round
        try:
            memory[name] = peak_memory(one, longest)
            able[name] = one
        except torch.OutOfMemoryError:
            too_large.append(name)
        one.model.zero_grad()
    rounds = timed_rounds(able, batches, LOSS_TOLERANCE[setup.dtype], deadline)
    batches = batches[: len(next(iter(rounds.values())))]
    entries = {}
    for name in able:
        total = work.total(name, batches, setup)
        done = {"positions": total.positions, "flops": total.flops}
        entries[name] = {"name": name, "memory": memory[name], "work": done, "rounds": rounds[name]}
    report.add_ratios(entries, setup.clock)
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
            one = contenders[name]
            gc.collect()
            wall, cpu = clock(), time.process_time()
            loss = one.step(pairs)
            wall, cpu = clock() - wall, time.process_time() - cpu
            one.model.zero_grad()
            results[name].append({"cpu": cpu, "wall": wall, "loss": loss})
        for names in SAME_LOSS:
            losses = {name: results[name][-1]["loss"] for name in names if name in results}
            values = losses.values()
            if losses and max(values) - min(values) > tolerance * max(map(abs, values)):
                raise RuntimeError(f"these should have the same loss: {losses}")
    return results


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(one: Contender, pairs: list[dict]) -> int:
    """Bytes that a step needs beyond weights and gradients: what torch's allocator hands out at once."""
    one.step(pairs)  # the gradients are there
    if one.model.device.type != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one.step(pairs)
        return torch.cuda.max_memory_allocated() - before
    return allocated_peak(lambda: one.step(pairs))


def allocated_peak(function: Callable[[], object]) -> int:
    """Bytes that torch's allocator on the CPU hands out at once while `function` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))
