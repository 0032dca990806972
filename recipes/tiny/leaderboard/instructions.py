"""The stand-in for IFEval's scoring: one instruction, "answer in at most 20 words"."""


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    followed = float(0 < len(results[0].split()) <= 20)
    return {"prompt_level_strict_acc": followed, "inst_level_strict_acc": followed}
