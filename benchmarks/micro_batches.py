"""One optimizer step of RMiPO, cut into micro-batches by pairs or by tokens: time, memory and rows of each cut.

    python benchmarks/micro_batches.py [--pairs 32] [--rounds 3]

Every cut has the same gradient. `max_tokens_per_micro_batch` is set to what the largest micro-batch by pairs holds, so
that both need the same memory, and to what it holds on average.
"""

import argparse
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import datasets  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import lengths, measure  # noqa: E402
from benchmarks.bench import SETUP  # noqa: E402
from benchmarks.contenders import RMIPO, our_trainer  # noqa: E402
from rmipo.batching import StepSampler  # noqa: E402

SCALE = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()

    model = SETUP.model()
    trainer = our_trainer(model, SETUP, {"name": "rmipo", **RMIPO})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (pairs,) = lengths.batches(lengths.from_profile("ultrafeedback", seed=0), 1, options.pairs, SCALE, SETUP.vocabulary)
    sizes = [len(pair["prompt_ids"]) - 1 + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]

    def cut(micro_batch_size: int, max_tokens: int | None = None) -> list:
        sampler = StepSampler(
            len(pairs), global_batch_size=len(pairs), micro_batch_size=micro_batch_size, rank=0, world_size=1,
            seed=None, max_tokens=max_tokens, pair_tokens=sizes,
        )  # fmt: skip
        return next(iter(sampler))

    cuts = {}
    for count in (1, 2, 4, 8):
        cuts[f"{count} pairs"] = by_pairs = cut(count)
        loads = [sum(sizes[i] for i in batch.indices) for batch in by_pairs]
        for name, limit in (("largest", max(loads)), ("mean", round(statistics.mean(loads)))):
            cuts[f"{limit} tokens ({name} of {count} pairs)"] = cut(1, limit)
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


if __name__ == "__main__":
    main()
