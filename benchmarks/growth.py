"""Step time against response length, prompt length and number of pairs: measured points, and the work model as lines.

    python -m benchmarks.growth [--rounds 3] [--output benchmarks/results/growth.json]

Writes the points as JSON and the plot beside it as PNG. All pairs have the same lengths, so that nothing is padding.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import datasets
import torch
from tqdm import tqdm

from benchmarks import lengths, measure, report, work
from benchmarks.bench import KEY, SETUP
from benchmarks.contenders import build
from rmipo.plots import house_style, panels, save

BASE = {"response": 96, "prompt": 64, "pairs": 2}
SWEEPS = {"response": (32, 96, 192, 320, 448), "prompt": (16, 64, 192, 320, 448), "pairs": (1, 2, 4, 6, 8)}
LABELS = {"response": "response length (tokens)", "prompt": "prompt length (tokens)", "pairs": "pairs per micro-batch"}


def batch(swept: str, value: int, seed: int) -> list[dict]:
    sizes = BASE | {swept: value}
    return lengths.make_pairs(
        [(sizes["prompt"], sizes["response"], sizes["response"])] * sizes["pairs"], SETUP.vocabulary, seed
    )


def points(rounds: int) -> dict:
    with contextlib.redirect_stderr(io.StringIO()):
        contenders = {name: build(name, SETUP) for name in KEY}
    for one in contenders.values():
        one.step(batch("pairs", 1, seed=0))
    progress = tqdm(total=len(KEY) * rounds * sum(map(len, SWEEPS.values())), unit="step")
    result: dict = {name: {} for name in KEY}
    for swept, values in SWEEPS.items():
        for value in values:
            batches = [batch(swept, value, seed) for seed in range(rounds)]
            times = measure.timed_rounds(contenders, batches, progress, tolerance=measure.LOSS_TOLERANCE[SETUP.dtype])
            for name, measured in times.items():
                point = {
                    "value": value,
                    "seconds": statistics.median(one["cpu"] for one in measured),
                    "flops": work.step_work(name, batches[0], SETUP).flops,
                }
                result[name].setdefault(swept, []).append(point)
    progress.close()
    return result


@house_style
def plot(result: dict, path: Path) -> None:
    every = [point for sweeps in result.values() for sweep in sweeps.values() for point in sweep]
    speed = statistics.median(point["flops"] / point["seconds"] for point in every)
    figure, axes = panels(3, height=2.6, sharey=True)
    for axis, swept in zip(axes, SWEEPS, strict=True):
        for number, (name, sweeps) in enumerate(result.items()):
            x = [point["value"] for point in sweeps[swept]]
            axis.plot(x, [point["seconds"] for point in sweeps[swept]], "o", color=f"C{number}", label=name)
            axis.plot(x, [point["flops"] / speed for point in sweeps[swept]], "-", color=f"C{number}", alpha=0.5)
        others = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != swept)
        axis.set(xlabel=LABELS[swept], title=others, xlim=(0, None), ylim=(0, None))
    axes[0].set_ylabel("CPU seconds per step")
    axes[0].legend()
    figure.suptitle(f"Points: measured; lines: the work model at {speed / 1e9:.0f} GFLOP/s")
    save(figure, path, (".png",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/growth.json"))
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output} exists")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    measured = points(options.rounds)
    report.save({"environment": report.environment(), "base": BASE, "points": measured}, options.output)
    plot(measured, options.output.with_suffix(".png"))
    print(f"saved {options.output} and the plot beside it")


if __name__ == "__main__":
    main()
