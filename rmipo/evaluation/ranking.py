"""How well a model ranks answers that are there already, right ones above wrong ones to the same prompt: no sampling.

The initial model answers the held-out prompts of `constraints`, once for all models trained from it, and a program says which
answers are right. Every model then scores the same answers, in a few forwards per prompt. Chance has 50% of couples in order.
Answers that were cut are left out: nearly all of them are wrong and long, and PMI per token ranks by length.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import pandas as pd

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.constraints import sample
from rmipo.evaluation.statistics import means, wins
from rmipo.files import locked, write_lines
from rmipo.fingerprints import json_fingerprint, trained_fingerprint
from rmipo.launch.choices import initial_model

DEFAULTS = {
    "first_n": 150,  # of the 573 prompts
    "skip_n": 0,  # prompts left out before those
    "answers": 8,  # of the initial model to each
    "initial": None,  # folder of the model that answers; that of the training's recipe if null, else the model itself
    "generation": {},
}
SCORES = {"ranking_auc": "logp", "ranking_pmi_auc": "pmi"}  # metric -> what of an answer's row it ranks by


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict:
    """Score the initial model's answers. The numbers of each go to `output_dir`/ranking.jsonl."""
    from tqdm import tqdm

    from rmipo.generation.oracles import Likelihood
    from rmipo.generation.prompts import Prompt

    settings["initial"] = initial_model(model_dir, settings["initial"])
    initial = Path(settings["initial"])  # a folder, and no hub id: the answers are kept in it
    settings["initial_fingerprint"] = trained_fingerprint(initial)
    # Of models that are measured side by side the first one has the answers made, and the others wait for them.
    print(f"ranking: answers of {initial}, made once or waited for", flush=True)
    with locked(initial / "eval/answers", wait=-1):
        generator, sampled = sample("ranking", initial, settings)
    settings["answers_sha256"] = json_fingerprint([answer for _, answers, _ in sampled for answer in answers])
    right = [verified(*prompt) for prompt in sampled]
    verdicts = [verdict for own in right for verdict in own.values()]
    # Others have no couple to rank.
    numbers = [number for number, own in enumerate(right) if len({*own.values()}) == 2]
    if not numbers:
        found = f"{sum(verdicts)} of {len(verdicts)} are right, {generator.cut:.0f}% cut"
        raise EvaluationError(f"ranking: none of {len(right)} prompts has right and wrong whole answers ({found})")
    model, rows = Likelihood(model_dir, generator.settings["dtype"]), []
    for number in tqdm(numbers, desc="ranking", unit="prompt"):
        asked = [{"role": "user", "content": sampled[number][0]["prompt"]}]
        scores = model.scores(Prompt(str(number), asked, {answer: answer for answer in right[number]}))
        for answer, (logp, pmi) in scores.items():
            rows.append({"prompt": number, "answer": answer, "right": right[number][answer], "logp": logp, "pmi": pmi})
    write_lines(output_dir / "ranking.jsonl", rows)
    per_prompt = by_prompt(rows, len(right))
    metrics = means(per_prompt) | {"ranking_prompts": len(numbers)}
    metrics |= {"ranking_right": 100 * mean(verdicts), "ranking_cut": generator.cut}
    weights = trained_fingerprint(model_dir)  # the generator's are the initial model's
    return generator.result(metrics, settings, ["lm_eval"], per_prompt=per_prompt, fingerprint=weights)


def verified(prompt: dict, answers: list[str], whole: list[bool]) -> dict[str, bool]:
    """The whole answers to one prompt, each text once, and whether it is right and follows all constraints."""
    from rmipo.constraints.instructions import solved  # needs lm-eval

    return {answer: solved(prompt, answer) for answer, ended in zip(answers, whole, strict=True) if ended}


def auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Percent of the couples of a right and a wrong answer that the scores order; a tie counts half. None without a couple."""
    scores, right = np.asarray(scores), np.asarray(right, dtype=bool)
    won = wins(scores[right, None], scores[~right])
    return 100 * float(won.mean()) if won.size else None


def by_prompt(rows: list[dict], prompts: int) -> dict[str, list[float | None]]:
    """Per metric the AUC of each of the prompts."""
    scores = pd.DataFrame(rows, columns=["prompt", "right", *SCORES.values()])
    answers = [scores[scores["prompt"] == number] for number in range(prompts)]
    return {name: [auc(own[key], own["right"]) for own in answers] for name, key in SCORES.items()}


BENCHMARK = Benchmark(
    name="ranking",
    title="Ranking of right answers",
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "ranking_auc": Metric("AUC by log pi(y|x) (%)"),
        "ranking_pmi_auc": Metric("AUC by PMI (%)"),
        "ranking_prompts": Metric("Prompts", 0, better=None),
        "ranking_right": Metric("Right, of different whole answers (%)", better=None),
        "ranking_cut": Metric("Cut (%)", better=None),
    },
    # All models of a table rank the same answers, whatever template and sampling they were made with.
    same=(
        "answers_sha256", "prompts_sha256", "first_n", "skip_n", "answers", "initial_fingerprint", *DECODING,
        "generation.seed",
    ),
    trial=("first_n", "skip_n"),
)  # fmt: skip
