"""Our training step against the authors' way, padded SimPO and TRL on the CPU: ratios of time and of memory.

    make bench                            all cases, about ten minutes on two cores
    make bench ARGS="--cases main"        the case that the targets are set for

One thread. Lengths are divided by 4: attention's share of the work grows with length / width, and a model of width 512
at full length would spend on it six times the share that the 8B does. The case "full-lengths" doesn't divide them.
"""

import argparse
import dataclasses
import logging
import os
import shlex
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import datasets
import torch
import transformers

from benchmarks import lengths, measure
from benchmarks.contenders import BUILDERS, Setup

# A Llama in which, as in the 8B, the LM head has 7% of the weights.
SETUP = Setup(hidden=512, layers=2, vocabulary=1024, checkpointing=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One table."""

    micro_batch: int = 4
    profile: str = "ultrafeedback"
    scale: float = 0.25
    contenders: tuple[str, ...] = ("padded-rmipo", "padded-simpo", "rmipo", "simpo")
    setup: Setup = SETUP


CASES = {
    "main": Case(contenders=tuple(BUILDERS)),
    "micro-batch-1": Case(micro_batch=1),
    "micro-batch-2": Case(micro_batch=2),
    "micro-batch-8": Case(micro_batch=8),
    "no-checkpointing": Case(setup=dataclasses.replace(SETUP, checkpointing=False)),
    # 32 logits per unit of width, as in the 8B: what logits cost in memory. (Here the head has half the weights.)
    "large-vocabulary": Case(setup=dataclasses.replace(SETUP, vocabulary=16384)),
    "alpacaeval": Case(profile="alpacaeval"),
    "full-lengths": Case(scale=1.0, setup=dataclasses.replace(SETUP, layers=1, vocabulary=512)),
}


def quiet() -> None:
    """The libraries' notes on every step."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    """It knows where the results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    stamp = time.strftime("%Y%m%d-%H%M%S")  # earlier results stay
    parser.add_argument("--output", type=Path, default=Path(f"outputs/bench/{name}{stamp}.json"))
    return parser


def main() -> None:
    parser = parser_of(__doc__, "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args(sys.argv[1:] or shlex.split(os.environ.get("ARGS", "")))
    quiet()
    torch.set_num_threads(1)
    result = {"environment": measure.environment(), "cases": {}}
    for name in options.cases:
        case = CASES[name]
        batches = lengths.batches(case.profile, options.rounds, case.micro_batch, case.scale, case.setup.vocabulary)
        found = measure.run_case(measure.build_all(case.contenders, case.setup), case.setup, batches)
        result["cases"][name] = dataclasses.asdict(case) | found
        print(f"\n{name}: {case}; CPU seconds, ratios min median max of {options.rounds} rounds")
        print(measure.table(found["contenders"], case.setup.clock), flush=True)
        measure.save(result, options.output)
    print(f"\nsaved {options.output}")


if __name__ == "__main__":
    main()
