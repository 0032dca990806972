"""One optimizer step of RMiPO, cut into micro-batches by pairs or by tokens.

    python -m benchmarks.micro_batches [--pairs 16] [--rounds 3]

Every cut has the same gradient. Measured are time, memory and rows of each; `max_tokens_per_micro_batch` is set to what
the largest micro-batch by pairs holds, so that both need the same memory, and to what it holds on average. Counted, for
global batches of 128 pairs, is what ranks lose by waiting: under ZeRO-3 each forward takes as long as its longest row.
"""

import argparse
import itertools
import logging
import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import datasets
import torch
from tqdm import tqdm

from benchmarks import lengths, measure
from benchmarks.bench import SETUP
from benchmarks.contenders import RMIPO, our_trainer
from rmipo.training.batching import StepSampler

SCALE = 0.25
RECIPE_TOKENS = 8192  # max_tokens_per_micro_batch of the 7B and 8B recipes


def micro_batches(
    sizes: list[int], rank: int, ranks: int, pairs: int, max_tokens: int | None = None, regroups: str = "nothing"
) -> list:
    """This rank's micro-batches of one step over all pairs."""
    sampler = StepSampler(
        len(sizes), global_batch_size=len(sizes), micro_batch_size=pairs, rank=rank, world_size=ranks, seed=None,
        max_tokens=max_tokens, pair_tokens=sizes, regroups=regroups,
    )  # fmt: skip
    return next(iter(sampler))


def waiting(ranks: int, pairs: int, steps: int = 30) -> dict[str, tuple[float, float, float]]:
    """By pairs and by tokens: forwards per step, longest row, and time relative to ranks that never wait (medians)."""
    source = lengths.from_profile("ultrafeedback", seed=1)
    drawn = [[p - 1 + c + r for p, c, r in itertools.islice(source, 128)] for _ in range(steps)]

    def cost(sizes: list[int], max_tokens: int | None, regroups: str = "nothing") -> tuple[int, int, float]:
        cut = [micro_batches(sizes, rank, ranks, pairs, max_tokens, regroups) for rank in range(ranks)]
        loads = [[sum(sizes[i] for i in batch.indices) for batch in own] for own in cut]
        longest = [max(forward) for forward in zip(*loads, strict=True)]
        return len(longest), max(longest), sum(longest) / (sum(sizes) / ranks)

    by_pairs = [cost(sizes, None) for sizes in drawn]
    limit = round(statistics.median(longest for _, longest, _ in by_pairs))
    by_tokens = [cost(sizes, limit) for sizes in drawn]
    by_recipe = [cost(sizes, RECIPE_TOKENS) for sizes in drawn]
    cuts = {f"{pairs} pairs": by_pairs}
    for regroups in ("pairs", "micro-batches"):  # methods that count pairs: KTO and alpha-DPO, CPO
        cuts[f"{pairs}, {regroups}"] = [cost(sizes, None, regroups) for sizes in drawn]
    cuts |= {f"{limit} tokens": by_tokens, f"{RECIPE_TOKENS} tokens": by_recipe}
    return {name: tuple(map(statistics.median, zip(*costs, strict=True))) for name, costs in cuts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()

    model = SETUP.model()
    trainer = our_trainer(model, SETUP, {"name": "rmipo", **RMIPO})
    model.activation_checkpointing_enable({"use_reentrant": False})
    (pairs,) = lengths.batches(lengths.from_profile("ultrafeedback", seed=0), 1, options.pairs, SCALE, SETUP.vocabulary)
    sizes = [len(pair["prompt_ids"]) - 1 + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]

    cuts = {}
    for count in (1, 2, 4):
        cuts[f"{count} pairs"] = by_pairs = micro_batches(sizes, 0, 1, count)
        loads = [sum(sizes[i] for i in batch.indices) for batch in by_pairs]
        for name, limit in (("largest", max(loads)), ("mean", round(statistics.mean(loads)))):
            cuts[f"{limit} tokens ({name} of {count} pairs)"] = micro_batches(sizes, 0, 1, 1, limit)
    times: dict[str, list[float]] = {name: [] for name in cuts}
    memory = {}
    progress = tqdm(total=len(cuts) * (options.rounds + 1), unit="step")
    for number in range(options.rounds + 1):
        for name in list(cuts)[:: -1 if number % 2 else 1]:
            step = trainer.collate([([pairs[i] for i in batch.indices], batch) for batch in cuts[name]])
            if number == 0:  # warms up as well
                memory[name] = measure.allocated_peak(lambda step=step: trainer.training_step(model, step))
            else:
                start = time.process_time()
                trainer.training_step(model, step)
                times[name].append(time.process_time() - start)
            model.zero_grad(set_to_none=False)
            progress.update()
    progress.close()
    print(f"{'cut':32} rows  largest  MiB   CPU seconds (median)")
    for name, batches in cuts.items():
        largest = max(sum(sizes[i] for i in batch.indices) for batch in batches)
        seconds = statistics.median(times[name])
        print(f"{name:32} {len(batches):4} {largest:8} {memory[name] / 2**20:5.0f} {seconds:7.2f}")

    print("\nranks  cut          forwards  longest row  time / no waiting")
    for ranks, count in itertools.product((1, 4, 8), (1, 2, 4)):
        for name, (forwards, longest, ratio) in waiting(ranks, count).items():
            print(f"{ranks:5}  {name:12} {forwards:8.0f} {longest:12.0f} {ratio:18.2f}")


if __name__ == "__main__":
    main()
