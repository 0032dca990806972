"""Our training step against the authors' way, padded SimPO and TRL on the CPU: ratios of time and of memory.

    make bench                            all cases, under ten minutes on two cores
    make bench ARGS="--cases main"        the case that the targets are set for

One thread. Lengths are divided by 4: attention's share of the work grows with length / width, and a model of width 512
at full length would spend on it six times the share that the 8B does. The case "full-lengths" doesn't divide them.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import datasets
import torch
import transformers
from tqdm import tqdm

from benchmarks import lengths, measure, report, work
from benchmarks.contenders import BUILDERS, Setup, build

KEY = ("padded-rmipo", "padded-simpo", "rmipo", "simpo")
BASES = ("padded-rmipo", "padded-simpo", "simpo")


# A Llama in which, as in the 8B, the LM head has 7% of the weights.
SETUP = Setup(hidden=512, layers=2, vocabulary=1024, checkpointing=True)


@dataclass(frozen=True)
class Case:
    """One table."""

    name: str
    micro_batch: int = 4
    profile: str = "ultrafeedback"
    scale: float = 0.25
    contenders: tuple[str, ...] = KEY
    setup: Setup = SETUP


CASES = (
    Case("main", contenders=tuple(BUILDERS)),
    Case("micro-batch-1", micro_batch=1),
    Case("micro-batch-2", micro_batch=2),
    Case("micro-batch-8", micro_batch=8),
    Case("no-checkpointing", setup=dataclasses.replace(SETUP, checkpointing=False)),
    # 32 logits per unit of width, as in the 8B: what logits cost in memory. (Here the head has half the weights.)
    Case("large-vocabulary", setup=dataclasses.replace(SETUP, vocabulary=16384)),
    Case("alpacaeval", profile="alpacaeval"),
    Case("full-lengths", scale=1.0, setup=dataclasses.replace(SETUP, layers=1, vocabulary=512)),
)


def draw(case: Case, rounds: int) -> list[list[dict]]:
    """A batch of pairs per round, the same for all contenders."""
    source = lengths.from_profile(case.profile, seed=0)
    return lengths.batches(source, rounds, case.micro_batch, case.scale, case.setup.vocabulary)


def run(case: Case, batches: list[list[dict]], progress: tqdm) -> dict:
    warm_up = lengths.make_pairs([(8, 16, 16)], case.setup.vocabulary, seed=0)
    longest = max(batches, key=lambda pairs: work.step_work("padded-simpo", pairs, case.setup).positions)
    memory = {}
    if case.name in ("main", "large-vocabulary"):
        for name in case.contenders:
            memory[name] = {"memory": measure.peak_activations(name, case.setup, warm_up, longest)}
    with contextlib.redirect_stderr(io.StringIO()):  # TRL's own progress bars
        contenders = {name: build(name, case.setup) for name in case.contenders}
    for one in contenders.values():
        one.step(warm_up)
        one.model.zero_grad()
    rounds = measure.timed_rounds(contenders, batches, progress, tolerance=measure.LOSS_TOLERANCE[case.setup.dtype])
    result = dataclasses.asdict(case) | {"contenders": {}}
    for name in case.contenders:
        total = work.total(name, batches, case.setup)
        entry = {"name": name, "work": total._asdict() | {"flops": total.flops}, "rounds": rounds[name]}
        result["contenders"][name] = entry | memory.get(name, {})
    report.add_ratios(result, BASES, clock="cpu")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[c.name for c in CASES])
    parser.add_argument("--rounds", type=int, default=7)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--output", type=Path, default=Path(f"outputs/bench/{stamp}.json"))
    options = parser.parse_args(sys.argv[1:] or shlex.split(os.environ.get("ARGS", "")))
    if options.output.exists():
        parser.error(f"--output {options.output} exists")

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cases = [case for case in CASES if case.name in options.cases]
    batches = {case: draw(case, options.rounds) for case in cases}
    result = {"environment": report.environment(), "rounds": options.rounds, "cases": {}}
    progress = tqdm(total=sum(len(case.contenders) for case in cases) * options.rounds, unit="step")
    for case in cases:
        result["cases"][case.name] = run(case, batches[case], progress)
        s = case.setup
        progress.write(
            f"\n{case.name}: {case.micro_batch} pairs, lengths of {case.profile} x {case.scale}, width {s.hidden}, "
            f"{s.layers} layers, vocabulary {s.vocabulary}, checkpointing {'on' if s.checkpointing else 'off'}; "
            f"CPU seconds, ratios min median max of {options.rounds} rounds"
        )
        progress.write(report.table(result["cases"][case.name], clock="cpu"))
        report.save(result, options.output)
    progress.close()
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
