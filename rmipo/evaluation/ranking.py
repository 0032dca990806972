"""How well a model ranks answers that are there already, right ones above wrong ones to the same prompt: no sampling.

The initial model answers the held-out prompts of `constraints`, once for all models trained from it, and a program says which
answers are right. Every model then scores the same answers, in a few forwards per prompt. Chance has 50% of couples in order.
Answers that were cut are left out: nearly all of them are wrong and long, and PMI per token ranks by length.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.constraints import held_out
from rmipo.evaluation.statistics import standard_error, wins
from rmipo.files import locked, write_lines
from rmipo.fingerprints import json_fingerprint, model_fingerprint, trained_fingerprint
from rmipo.launch.choices import initial_model
from rmipo.recipe.settings import merge_settings
from rmipo.record import require_package

DEFAULTS = {
    "first_n": 150,  # of the 573 prompts
    "skip_n": 0,  # prompts left out before those
    "answers": 8,  # of the initial model to each
    "initial": None,  # folder of the model that answers; that of the training's recipe if null, else the model itself
    "generation": {},
}
SCORES = {"ranking_auc": "logp", "ranking_pmi_auc": "pmi"}  # metric -> what of an answer's row it ranks by


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Score the initial model's answers. The numbers of each go to `output_dir`/ranking.jsonl."""
    settings = merge_settings("ranking", DEFAULTS, settings)
    require_package("lm_eval")
    from tqdm import tqdm

    from rmipo.generation.answers import Generator
    from rmipo.generation.likelihood import Likelihood
    from rmipo.generation.prompts import Prompt

    settings["initial"] = initial_model(model_dir, settings["initial"])
    if not Path(settings["initial"]).is_dir():  # the answers are kept in it
        fix = "make one with METHOD=initial, and --set ranking.initial=outputs/<setting>/initial"
        raise EvaluationError(f"ranking: the initial model {settings['initial']} is no folder: {fix}")
    settings["initial_fingerprint"] = model_fingerprint(settings["initial"])
    prompts, requests = held_out(settings)
    # Of models that are measured side by side the first one has the answers made, and the others wait for them.
    print(f"ranking: answers of {settings['initial']}, made once or waited for", flush=True)
    kept = Path(settings["initial"]) / "eval/answers"
    with locked(kept, wait=-1), Generator(settings["initial"], settings["generation"]) as generator:
        answers = generator.ask("ranking", requests)
    each, rows, tasks, verdicts = settings["answers"], [], [], []
    for number, prompt in enumerate(prompts):
        own = slice(number * each, (number + 1) * each)
        right = verified(prompt, answers[own], generator.finishes[own])
        verdicts += right.values()
        if len({*right.values()}) == 2:  # others have no couple to rank
            rows += [{"prompt": number, "answer": answer, "right": verdict} for answer, verdict in right.items()]
            tasks.append(Prompt(str(number), requests[own.start].messages, {answer: answer for answer in right}))
    if not tasks:
        found = f"{sum(verdicts)} of {len(verdicts)} are right, {generator.cut:.0f}% cut"
        raise EvaluationError(f"ranking: none of {len(prompts)} prompts has right and wrong whole answers ({found})")
    metrics = {"ranking_right": 100 * mean(verdicts), "ranking_cut": generator.cut}
    model = Likelihood(model_dir, generator.settings["dtype"])
    scores = [score for task in tqdm(tasks, desc="ranking", unit="prompt") for score in model.scores(task).values()]
    rows = [row | {"logp": logp, "pmi": pmi} for row, (logp, pmi) in zip(rows, scores, strict=True)]
    write_lines(Path(output_dir) / "ranking.jsonl", rows)
    values = by_prompt(rows, len(prompts))
    for name, percents in values.items():
        known = [percent for percent in percents if percent is not None]
        metrics |= {name: mean(known), f"{name}_standard_error": standard_error(known), "ranking_prompts": len(known)}
    settings |= {"prompts_sha256": json_fingerprint(prompts), "answers_sha256": json_fingerprint(answers)}
    weights = trained_fingerprint(Path(model_dir))  # the generator's are the initial model's
    return generator.result(metrics, settings, ["lm_eval"], per_prompt=values, fingerprint=weights)


def verified(prompt: dict, answers: list[str], finishes: list[str]) -> dict[str, bool]:
    """The whole answers to one prompt, each text once, and whether it is right and follows all constraints."""
    from rmipo.constraints.instructions import solved  # needs lm-eval

    whole = [answer for answer, finish in zip(answers, finishes, strict=True) if finish != "length"]
    return {answer: solved(prompt, answer) for answer in whole}


def auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Percent of the couples of a right and a wrong answer that the scores order; a tie counts half. None without a couple."""
    scores, right = np.asarray(scores), np.asarray(right, dtype=bool)
    won = wins(scores[right, None], scores[~right])
    return 100 * float(won.mean()) if won.size else None


def by_prompt(rows: list[dict], prompts: int) -> dict[str, list[float | None]]:
    """Per metric the AUC of each of the prompts."""
    answers = [[row for row in rows if row["prompt"] == number] for number in range(prompts)]
    return {
        name: [auc([row[key] for row in own], [row["right"] for row in own]) for own in answers]
        for name, key in SCORES.items()
    }


BENCHMARK = Benchmark(
    name="ranking",
    title="Ranking of right answers",
    run=run,
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
