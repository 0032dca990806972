"""What ranks lose by waiting for each other, counted: RMiPO's step, cut into micro-batches by pairs or by tokens.

    python -m benchmarks.micro_batches

Under ZeRO-3 each forward takes as long as its longest sequence over all ranks. Global batches have 128 pairs. The limit in
tokens is the median of what the largest micro-batch by pairs holds, so that both need the same memory.
"""

import itertools
import statistics

from benchmarks import lengths
from rmipo.training.batching import StepSampler

RECIPE_TOKENS = 8192  # max_tokens_per_micro_batch of the 7B and 8B recipes


def waiting(ranks: int, pairs: int, steps: int = 30) -> dict[str, tuple[float, float, float]]:
    """By pairs and by tokens: forwards per step, longest row, and time relative to ranks that never wait (medians)."""
    source = lengths.from_profile("ultrafeedback", seed=1)
    drawn = [[p - 1 + c + r for p, c, r in itertools.islice(source, 128)] for _ in range(steps)]

    def cost(sizes: list[int], max_tokens: int | None, regroups: str = "nothing") -> tuple[int, int, float]:
        step = {"global_batch_size": len(sizes), "micro_batch_size": pairs, "world_size": ranks, "seed": None}
        step |= {"max_tokens": max_tokens, "pair_tokens": sizes, "regroups": regroups}
        cut = [next(iter(StepSampler(len(sizes), rank=rank, **step))) for rank in range(ranks)]
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
    print("ranks  cut          forwards  longest sequence  time / no waiting")
    for ranks, count in itertools.product((1, 4, 8), (1, 2, 4)):
        for name, (forwards, longest, ratio) in waiting(ranks, count).items():
            print(f"{ranks:5}  {name:12} {forwards:8.0f} {longest:17.0f} {ratio:18.2f}")


if __name__ == "__main__":
    main()
