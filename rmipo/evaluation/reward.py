"""Win rates by a reward model: a sequence classifier scores the answers of several models to the same prompts.

Free and deterministic, and no stand-in for AlpacaEval: it says what this reward model prefers.
"""

from pathlib import Path

import numpy as np

from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca import load_reference
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.statistics import bootstrap, standard_error, wins
from rmipo.files import read_lines
from rmipo.fingerprints import has_weights, json_fingerprint, model_fingerprint, text_fingerprint, trained_fingerprint
from rmipo.recipe.settings import merge_settings

DEFAULTS = {
    "generation": {},
    "model": None,  # hub id or folder of a sequence classifier with one output and a chat template
    "reference": None,  # prompts, as for AlpacaEval; None: AlpacaEval's own
    "first_n": None,  # prompts
    "batch_size": 16,
    "dtype": "bfloat16",
}


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Score the answers of `model_dir`, and compare it with every folder beside it that has answered the same prompts.

    Answers are those of AlpacaEval where both have the same prompts and decoding; rewards are kept beside them. Metrics:
    `reward`, the mean, and `reward_length`, mean characters of an answer; for every other model `reward_wr_vs_<name>`,
    percent of prompts whose reward is higher (a tie is half), with `_low` and `_high` of its 95% paired bootstrap
    interval and `_standard_error`.
    """
    from rmipo.generation.answers import Generator, check_settings, questions
    from rmipo.generation.oracles import RewardModelOracle, keep_scores
    from rmipo.generation.prompts import Prompt

    settings = merge_settings("reward", DEFAULTS, settings)
    settings["generation"] = check_settings(settings["generation"])
    if settings["model"] is None:
        raise EvaluationError("reward: name one, e.g. --set reward.model=Skywork/Skywork-Reward-V2-Llama-3.1-8B")
    # Before answers are made: a model that isn't there is found out.
    scorer = {"fingerprint": model_fingerprint(settings["model"]), "dtype": settings["dtype"]}
    reference, reference_path = load_reference(settings["reference"])
    requests = questions(row["instruction"] for row in reference[: settings["first_n"]])
    with Generator(model_dir, settings["generation"]) as generator:
        file = generator.file("alpacaeval", requests)
        texts = generator.answer(requests, file)
    oracle = RewardModelOracle({"reward_model": settings["model"], "dtype": settings["dtype"],
                                "batch_size": settings["batch_size"]})  # fmt: skip

    def rewards(path: Path, answers: list[str]) -> list[float]:
        """Rewards of a file of answers, kept beside it under a name for this reward model and these answers."""
        of = scorer | {"answers": text_fingerprint(path.read_bytes())}
        kept = path.with_name(f"{path.stem}-{json_fingerprint(of)[:8]}.rewards")
        answered = [Prompt(r.key, r.messages, {r.key: a}) for r, a in zip(requests, answers, strict=True)]
        scores = keep_scores(kept, of, answered, oracle.score, "rewards")
        return [scores[request.key] for request in requests]

    ours = rewards(file, texts)
    metrics = {
        "reward": sum(ours) / len(ours),
        "reward_standard_error": standard_error(ours),
        "reward_length": sum(map(len, texts)) / len(texts),
        "reward_cut": generator.cut,
    }
    # Every method of this setting that answered the same prompts in the same way: the file's name says so.
    for other in sorted(Path(model_dir).resolve().parent.glob(f"*/eval/answers/{file.name}")):
        header, *rows = read_lines(other)
        folder = other.parents[2]
        if folder == Path(model_dir).resolve() or len(rows) < len(requests):
            continue
        if has_weights(folder) and header["model"] != trained_fingerprint(folder):
            raise EvaluationError(f"{other} has answers of other weights than those now in {folder}. Delete it")
        answers = {row["key"]: row["output"] for row in rows}
        theirs = [answers[request.key] for request in requests]
        # Padding moves the last bits of a reward: the same answer is a tie whatever they are.
        same = [a == b for a, b in zip(texts, theirs, strict=True)]
        rate = bootstrap(100 * np.where(same, 0.5, wins(ours, rewards(other, theirs))))
        key = f"reward_wr_vs_{folder.name}"
        metrics |= {key: rate.mean, f"{key}_low": rate.low, f"{key}_high": rate.high}
        metrics[f"{key}_standard_error"] = rate.standard_error
    settings["model_fingerprint"] = scorer["fingerprint"]
    settings["reference_sha256"] = text_fingerprint(reference_path.read_bytes())
    return generator.result(metrics, settings, per_prompt={"reward": ours})


BENCHMARK = Benchmark(
    name="reward",
    title="Reward model",
    run=run,
    defaults=DEFAULTS,
    metrics={
        "reward": Metric("Reward", digits=2),
        "reward_cut": Metric("Cut (%)", better=None),
        "reward_wr_vs_initial": Metric("Reward WR vs. initial (%)"),
    },
    same=("model", "model_fingerprint", "reference_sha256", "first_n", "dtype"),
    same_per_model=DECODING,
    trial=("first_n", "reference"),
)
