"""Win rates by a reward model: a sequence classifier scores the answers of several models to the same prompts.

Free and deterministic, and no stand-in for AlpacaEval: it says what this reward model prefers.
"""

import json
from pathlib import Path

import numpy as np

from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca_reference import load_reference
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import bootstrap, standard_error, wins
from rmipo.files import write_atomically
from rmipo.fingerprints import (
    has_weights,
    json_fingerprint,
    model_fingerprint,
    text_fingerprint,
    trained_fingerprint,
)
from rmipo.recipe.settings import merge_settings
from rmipo.record import package_versions

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

    Raises EvaluationError for wrong settings before a model is loaded and for answers of weights that are no longer in
    their folder, and RewardModelError for a reward model that can't be used.
    """
    from rmipo.generation.answers import Generator, Request, check_settings

    settings = merge_settings("reward", DEFAULTS, settings)
    settings["generation"] = check_settings(settings["generation"])
    if settings["model"] is None:
        raise EvaluationError(
            "reward: no reward model; name one, e.g. --set reward.model=Skywork/Skywork-Reward-V2-Llama-3.1-8B"
        )
    try:
        scorer = {"model": settings["model"], "fingerprint": model_fingerprint(settings["model"])}
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"reward.model: {settings['model']} is neither a folder nor reachable on the hub"
        ) from error
    reference, reference_path = load_reference(settings["reference"])
    prompts = [row["instruction"] for row in reference[: settings["first_n"]]]
    requests = [Request(str(i), [{"role": "user", "content": prompt}]) for i, prompt in enumerate(prompts)]
    with Generator(model_dir, settings["generation"]) as generator:
        file = generator.file("alpacaeval", requests)
        generator.answer(requests, file)

    scores = Scores(settings, scorer, prompts)
    folder = Path(model_dir)
    ours, texts = scores.of(file)
    metrics = {
        "reward": sum(ours) / len(ours),
        "reward_standard_error": standard_error(ours),
        "reward_length": sum(map(len, texts)) / len(texts),
        "reward_cut": generator.cut,
    }
    others = sorted(folder.resolve().parent.glob(f"*/eval/answers/{file.name}"))
    for other in others:
        theirs_folder, name = other.parents[2], other.parents[2].name
        if theirs_folder == folder.resolve() or not scores.complete(other):
            continue
        require_own_answers(theirs_folder, other)
        theirs, other_texts = scores.of(other)
        # Padding moves the last bits of a reward: the same answer is a tie whatever they are.
        same = [a == b for a, b in zip(texts, other_texts, strict=True)]
        rate = bootstrap(100 * np.where(same, 0.5, wins(ours, theirs)))
        key = f"reward_wr_vs_{name}"
        metrics |= {key: rate.mean, f"{key}_low": rate.low, f"{key}_high": rate.high}
        metrics[f"{key}_standard_error"] = rate.standard_error
    settings |= {
        "generation": generator.settings,
        "model_fingerprint": scorer["fingerprint"],
        "reference_sha256": text_fingerprint(reference_path.read_bytes()),
    }
    versions = generator.versions | package_versions("transformers", "torch")
    return {"metrics": metrics, "versions": versions, "settings": settings, "fingerprint": generator.fingerprint}


def require_own_answers(folder: Path, file: Path) -> None:
    """Raises EvaluationError if the answers in `file` are of other weights than `folder` holds now."""
    from rmipo.generation.answers import read_answers

    header = read_answers(file)[0]
    if has_weights(folder) and header["model"] != trained_fingerprint(folder):
        raise EvaluationError(
            f"{file} has answers of other weights than those now in {folder}. Delete it, and evaluate that model first or "
            "leave it out of the comparison"
        )


class Scores:
    """Rewards of files of answers, kept in a file beside each; the reward model is loaded for the first that needs it."""

    def __init__(self, settings: dict, scorer: dict, prompts: list[str]):
        self.settings, self.prompts, self.model = settings, prompts, None
        self.scorer = scorer | {"dtype": settings["dtype"]}

    def complete(self, file: Path) -> bool:
        from rmipo.generation.answers import read_answers

        return len(read_answers(file)[1]) == len(self.prompts)

    def of(self, file: Path) -> tuple[list[float], list[str]]:
        """(rewards, answers) of `file`, prompt by prompt."""
        from rmipo.generation.answers import read_answers
        from rmipo.generation.reward_model import RewardModel

        answers = read_answers(file)[1]
        texts = [answers[str(i)]["output"] for i in range(len(self.prompts))]
        identity = self.scorer | {"answers": text_fingerprint(file.read_bytes())}
        kept = file.with_name(f"{file.stem}.rewards-{json_fingerprint(self.scorer)[:8]}.json")
        found = json.loads(kept.read_text()) if kept.is_file() else None
        if found is None or found["identity"] != identity:
            self.model = self.model or RewardModel(
                self.settings["model"], self.settings["dtype"], self.settings["batch_size"]
            )
            dialogues = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                for prompt, text in zip(self.prompts, texts, strict=True)
            ]
            rewards = [reward for _, reward in sorted(self.model.score(dialogues))]
            found = {"identity": identity, "rewards": rewards}
            write_atomically(kept, json.dumps(found) + "\n")
        return found["rewards"], texts


BENCHMARK = Benchmark(
    name="reward",
    title="Reward model",
    run=run,
    defaults=DEFAULTS,
    metrics={
        "reward": Metric("Reward", digits=2, standard_error="reward_standard_error"),
        "reward_wr_vs_initial": Metric(
            "Reward WR vs. initial (%)", standard_error="reward_wr_vs_initial_standard_error"
        ),
    },
    same=("model", "model_fingerprint", "reference_sha256", "first_n", "dtype"),
    same_per_model=tuple(f"generation.{key}" for key in ("temperature", "top_p", "top_k", "max_new_tokens", "dtype")),
    trial=("first_n", "reference"),
)
