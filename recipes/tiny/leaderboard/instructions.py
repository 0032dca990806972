"""What the stand-ins for the leaderboard's generation tasks count."""


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """IFEval's: one instruction, "answer in at most 20 words"."""
    followed = float(0 < len(results[0].split()) <= 20)
    return {"prompt_level_strict_acc": followed, "inst_level_strict_acc": followed}


def exact(doc: dict, results: list[str]) -> dict[str, float]:
    """MATH's two scorers, which agree here."""
    right = float(results[0].strip() == doc["chosen"][-1]["content"])
    return {"exact_match": right, "exact_match_original": right}
