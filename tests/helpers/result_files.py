"""Run folders and result files as trainings and evaluations leave them."""

import json
from pathlib import Path

# How the paper evaluated; transcribed here a second time.
JUDGES = {
    "alpacaeval": {
        "annotators_config": "weighted_alpaca_eval_gpt4_turbo",
        "judge_sha256": "595455fc9cc923f5",
        "judge_endpoint": "api.openai.com/v1",
    },
    "mtbench": {"judge_model": "gpt-4", "judge_endpoint": "api.openai.com/v1", "max_new_tokens": 1024},
}
ALL_TOKENS = {"top_p": 1.0, "top_k": 0}
DECODING = {
    "mistral-7b-base": {"temperature": 0.7, "max_new_tokens": 2048} | ALL_TOKENS,
    "mistral-7b-instruct": {"temperature": 0.5, "max_new_tokens": 2048} | ALL_TOKENS,
    "llama3-8b-base": {"temperature": 0.9, "max_new_tokens": 4096} | ALL_TOKENS,
    "llama3-8b-instruct": {"temperature": 0.9, "max_new_tokens": 4096} | ALL_TOKENS,
}


def write_result(outputs: Path, model: str, method: str, bench: str, metrics: dict, **changes) -> Path:
    """A finished result made as in the paper; `changes`: other keys of the file, `settings` laid over the paper's.

    `name`: its EVAL_NAME.
    """
    settings = JUDGES.get(bench, {}) | {"generation": DECODING.get(model, {})} | changes.pop("settings", {})
    path = outputs / model / method / "eval" / changes.pop("name", "") / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"bench": bench, "metrics": metrics, "versions": {"lm_eval": "0.4.13"}, "settings": settings}
    content |= {"model": "m", "finished": True}
    path.write_text(json.dumps(content | changes))
    return path


RUN_FACTS = ("fingerprints", "seconds", "starts", "hardware", "versions")


def write_run(
    folder: Path, objective: dict, log: list[dict], learning_rate: float = 3e-7, finished: bool = True, **more
) -> None:
    """`more`: RUN_FACTS beside the recipe, anything else in it."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {key: more.pop(key) for key in RUN_FACTS if key in more}
    record = {"finished": finished, "recipe": {"learning_rate": learning_rate, **more}, "objective": objective}
    record["versions"] = {"torch": "2.13.0"}
    (folder / "run.json").write_text(json.dumps(record | facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
