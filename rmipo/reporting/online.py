"""The course of `make online`: what each round's policy is on held-out prompts, as a table and a figure."""

import json
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.statistics import standard_error
from rmipo.files import write_atomically, write_lines
from rmipo.fingerprints import json_fingerprint, model_fingerprint
from rmipo.generation.oracles import Candidates, make_oracle
from rmipo.generation.prompts import read_prompts
from rmipo.generation.scores import fill, read_lines
from rmipo.launch.online import OnlineConfig
from rmipo.reporting import figures

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
    oracle = make_oracle(config.pairs["oracle"])
    header = {"model": model_fingerprint(model_dir), "settings": settings | {"generation": generation}}
    header |= {"start": model_fingerprint(start), "oracle": oracle.identity}
    kept = folder / "online.json"
    if kept.is_file() and (found := json.loads(kept.read_text()))["of"] == header:
        return found["metrics"]
    result = BENCHMARKS["specificity"].run(model_dir, folder, settings | {"generation": generation})
    columns = {p.key: p.columns for p in read_prompts(config.held_out, "test", model_dir, Counter())}
    candidates = []
    for row in read_lines(folder / "specificity.jsonl"):
        key = json_fingerprint(row["prompt"])
        candidates.append(Candidates(key, row["prompt"], {key: row["answer"]}, columns[key]))
    scores = fill(folder / "scores.jsonl", header, candidates, oracle.score, "scores of the oracle")
    values = list(scores.values())
    reward = {"reward": sum(values) / len(values), "reward_standard_error": standard_error(values)}
    metrics = result["metrics"] | reward
    write_atomically(kept, json.dumps({"of": header, "metrics": metrics}, indent=2) + "\n")
    return metrics


def report(rows: list[dict], home: Path) -> str:
    """Write rounds.jsonl, rounds.md and rounds.png in `home`; the table as text."""
    write_lines(home / "rounds.jsonl", rows)
    frame = pd.DataFrame(rows)
    texts = {"round": frame["round"].astype(str)}
    for name, label in COLUMNS.items():
        error = frame.get(f"{name}_standard_error")
        texts[label] = [
            f"{value:.2f}" + ("" if error is None else f" ± {error[i]:.2f}") for i, value in enumerate(frame[name])
        ]
    header = "| " + " | ".join(texts) + " |"
    lines = [header, "|" + "---|" * len(texts)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*texts.values(), strict=True)]
    table = "\n".join(lines) + "\n"
    write_atomically(home / "rounds.md", table)
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(1, len(COLUMNS), figsize=(figures.PAGE_WIDTH, 1.9), layout="constrained")
        for axis, (name, label) in zip(axes, COLUMNS.items(), strict=True):
            error = frame.get(f"{name}_standard_error")
            axis.errorbar(frame["round"], frame[name], yerr=error, marker="o", color=figures.BLUE, capsize=2)
            axis.set(xlabel="round", title=label, xticks=frame["round"])
            axis.title.set_size(7)
        figure.savefig(home / "rounds.png", dpi=200)
        plt.close(figure)
    return table
