"""Pairs of random tokens with the lengths of real ones."""

import itertools
import math
import random
from collections.abc import Iterator

MAX_LENGTH, MAX_PROMPT_LENGTH = 2048, 1800  # the recipes' limits
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
