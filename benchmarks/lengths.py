"""Pairs of random tokens with the lengths of real ones; and what ranks lose by waiting for each other over such lengths.

    python -m benchmarks.lengths        RMiPO's step, cut into micro-batches by pairs or by tokens: counted, not timed

Under ZeRO-3 each forward takes as long as its longest sequence over all ranks. Global batches have 128 pairs. The limit in
tokens is the median of what the largest micro-batch by pairs holds, so that both need the same memory.
"""

import itertools
import math
import random
import statistics
from collections.abc import Iterator

from rmipo.training.batching import StepSampler

MAX_LENGTH, MAX_PROMPT_LENGTH = 2048, 1800  # the recipes' limits
RECIPE_TOKENS = 8192  # max_tokens_per_micro_batch of the 7B and 8B recipes
# Log-normal lengths in tokens of prompt, chosen and rejected, each as (median, standard deviation of the logarithm); then the
# correlation of the logarithms of a pair's two response lengths.
PROFILES = {
    # Means of about 165, 315 and 270: the bytes per row of ultrafeedback_binarized's columns at 4 characters a token.
    "ultrafeedback": ((80, 1.2), (250, 0.7), (205, 0.75), 0.6),
    # Fitted to 2799 pairs of published AlpacaEval outputs at 4 characters a token, and a chat template's 10 tokens.
    "alpacaeval": ((42, 0.7), (286, 1.0), (153, 1.0), 0.62),
}


def from_profile(name: str, seed: int) -> Iterator[tuple[int, int, int]]:
    """Endless (prompt, chosen, rejected) lengths, cut by the limits."""
    *parts, correlation = PROFILES[name]
    rng = random.Random(seed)
    while True:
        a, b, c = (rng.gauss(0, 1) for _ in range(3))
        normals = (a, b, correlation * b + math.sqrt(1 - correlation**2) * c)
        drawn = [round(median * math.exp(sd * z)) for (median, sd), z in zip(parts, normals, strict=True)]
        prompt = max(1, min(drawn[0], MAX_PROMPT_LENGTH))
        yield prompt, *(max(1, min(length, MAX_LENGTH - prompt)) for length in drawn[1:])


def make_pairs(lengths: list[tuple[int, int, int]], vocabulary: int, seed: int) -> list[dict]:
    """Tokenised pairs of these lengths, as `data.tokenize_pairs` gives them, with cached sums of a reference."""
    rng = random.Random(seed)
    pairs = []
    for row, sizes in enumerate(lengths):
        prompt, chosen, rejected = (rng.choices(range(3, vocabulary), k=size) for size in sizes)
        pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "row": row}
        pairs.append(pair | {"ref_chosen_logps": -5.0 * sizes[1], "ref_rejected_logps": -5.0 * sizes[2]})
    return pairs


def batches(profile: str, count: int, size: int, scale: float, vocabulary: int) -> list[list[dict]]:
    """`count` batches of `size` pairs with lengths of a profile times `scale`."""
    scaled = (tuple(max(2, round(length * scale)) for length in pair) for pair in from_profile(profile, seed=0))
    return [make_pairs(list(itertools.islice(scaled, size)), vocabulary, seed) for seed in range(count)]


def waiting(ranks: int, pairs: int, steps: int = 30) -> dict[str, tuple[float, float, float]]:
    """By pairs and by tokens: forwards per step, longest row, and time relative to ranks that never wait (medians)."""
    source = from_profile("ultrafeedback", seed=1)
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
