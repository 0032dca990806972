"""Run folders and result files as trainings and evaluations leave them."""

import json
from pathlib import Path


def write_result(outputs: Path, model: str, method: str, bench: str, metrics: dict, **changes) -> Path:
    path = outputs / model / method / "eval" / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"bench": bench, "metrics": metrics, "versions": {"lm_eval": "0.4.13"}, "settings": {}, "model": "m"}
    path.write_text(json.dumps(content | {"finished": True} | changes))
    return path


RUN_FACTS = ("fingerprints", "seconds", "starts")


def write_run(
    folder: Path, objective: dict, log: list[dict], learning_rate: float = 3e-7, finished: bool = True, **more
) -> None:
    """`more`: RUN_FACTS beside the recipe, anything else in it."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {key: more.pop(key) for key in RUN_FACTS if key in more}
    record = {"finished": finished, "recipe": {"learning_rate": learning_rate, **more}, "objective": objective}
    (folder / "run.json").write_text(json.dumps(record | facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
