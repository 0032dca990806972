"""Time of steps in alternating order, and peak memory of one step in a process of its own."""

import contextlib
import gc
import io
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.contenders import SAME_LOSS, Contender, Setup, build

# Relative, between ways to compute the same loss.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def timed_rounds(
    contenders: dict[str, Contender],
    batches: list[list[dict]],
    progress: tqdm,
    *,
    tolerance: float,
    clock: Callable[[], float] = time.perf_counter,
    deadline: float = math.inf,
) -> dict[str, list[dict]]:
    """Time every contender on every batch; odd rounds run in reverse order.

    Args:
        tolerance: relative difference at most between losses of the same objective.
        clock: of the wall time; a GPU's must wait for the device.
        deadline: of `time.monotonic`; no round but the first starts after it.

    Returns:
        name -> one `{"cpu": seconds, "wall": seconds, "loss": value}` per batch.

    Raises:
        RuntimeError: ways to compute the same loss disagree.
    """
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    for number, pairs in enumerate(batches):
        if number and time.monotonic() > deadline:
            break
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            progress.set_description(name)
            one = contenders[name]
            gc.collect()
            wall, cpu = clock(), time.process_time()
            loss = one.step(pairs)
            wall, cpu = clock() - wall, time.process_time() - cpu
            one.model.zero_grad()
            results[name].append({"cpu": cpu, "wall": wall, "loss": loss})
            progress.update()
        for names in SAME_LOSS:
            losses = {name: results[name][-1]["loss"] for name in names if name in results}
            values = losses.values()
            if losses and max(values) - min(values) > tolerance * max(map(abs, values)):
                raise RuntimeError(f"these should have the same loss: {losses}")
    return results


def peak_activations(name: str, setup: Setup, warm_up: list[dict], pairs: list[dict]) -> int:
    """Bytes that one step needs at once beyond weights and gradients, measured in a process of its own.

    Counted is what torch's allocator hands out, so that the number is exact and the same each time.
    """
    context = multiprocessing.get_context("fork")  # a child that need not import everything again
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_measure_peak, name, setup, warm_up, pairs).result()


def _measure_peak(name: str, setup: Setup, warm_up: list[dict], pairs: list[dict]) -> int:
    with contextlib.redirect_stderr(io.StringIO()):  # TRL's own progress bars
        step = build(name, setup).step
    step(warm_up)  # allocates the gradients
    return allocated_peak(lambda: step(pairs))


def allocated_peak(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator hands out at once during `call`."""
    with _stderr_closed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """The profiler's native code announces itself there, whatever its log level."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
