"""The course of `make online`: what each round's policy is on held-out prompts, as a table and a figure."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd

from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.statistics import standard_error
from rmipo.files import read_lines, write_atomically, write_lines
from rmipo.fingerprints import json_fingerprint, model_fingerprint
from rmipo.generation.oracles import keep_scores, make_oracle
from rmipo.generation.prompts import read_prompts
from rmipo.launch.online import OnlineConfig
from rmipo.plots import BLUE, house_style, panels, save
from rmipo.reporting.render import markdown_table

COLUMNS = {
    "reward": "reward, held out",
    "kl_initial": "KL to the start (nats)",
    "tokens": "tokens per answer",
    "specificity": "own prompt most likely (%)",
}


def measure(model_dir: Path, start: Path, config: OnlineConfig, generation: dict, folder: Path) -> dict:
    """The specificity benchmark of a policy against `start`, and the oracle's mean score of the same answers.

    What is in `folder` of the same policy and settings is not measured again.
    """
    settings = {"prompts": config.held_out, "first_n": config.held_out_prompts, "initial": str(start)}
    oracle = make_oracle(config.pairs.oracle)
    header = {"model": model_fingerprint(model_dir), "settings": settings | {"generation": generation}}
    header |= {"start": model_fingerprint(start), "oracle": oracle.identity}
    kept = folder / "online.json"
    # More ROUNDS come back to rounds that are measured already.
    if kept.is_file() and (found := json.loads(kept.read_text()))["of"] == header:
        return found["metrics"]
    # Its answers serve the oracle too: every policy answers once.
    result = BENCHMARKS["specificity"].run(model_dir, folder, settings | {"generation": generation})
    answers = {json_fingerprint(row["prompt"]): row["answer"] for row in read_lines(folder / "specificity.jsonl")}
    prompts = read_prompts(config.held_out, "test", model_dir, Counter())
    answered = [replace(p, answers={p.key: answers[p.key]}) for p in prompts if p.key in answers]
    scores = keep_scores(folder / "scores.jsonl", header, answered, oracle.score, "scores of the oracle")
    values = list(scores.values())
    metrics = result["metrics"] | {"reward": sum(values) / len(values), "reward_standard_error": standard_error(values)}
    write_atomically(kept, json.dumps({"of": header, "metrics": metrics}, indent=2) + "\n")
    return metrics


@house_style
def report(rows: list[dict], home: Path) -> str:
    """Write rounds.jsonl, rounds.md and rounds.png in `home`; the table as text."""
    write_lines(home / "rounds.jsonl", rows)
    frame = pd.DataFrame(rows)
    texts = {"round": frame["round"].astype(str)}
    figure, axes = panels(len(COLUMNS), height=1.9)
    for axis, (name, label) in zip(axes, COLUMNS.items(), strict=True):
        error = frame.get(f"{name}_standard_error")
        texts[label] = frame[name].map("{:.2f}".format) + ("" if error is None else error.map(" ± {:.2f}".format))
        axis.errorbar(frame["round"], frame[name], yerr=error, marker="o", color=BLUE, capsize=2)
        axis.set(xlabel="round", xticks=frame["round"])
        axis.set_title(label, fontsize=7)
    save(figure, home / "rounds.png", (".png",))
    text = markdown_table([list(texts), *zip(*texts.values(), strict=True)]) + "\n"
    write_atomically(home / "rounds.md", text)
    return text
