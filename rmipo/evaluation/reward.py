"""Win rates by a reward model: a sequence classifier scores the answers of several models to the same prompts.

Free and deterministic, and no stand-in for AlpacaEval: it says what this reward model prefers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca_reference import load_reference
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.statistics import bootstrap, standard_error, wins
from rmipo.files import write_atomically
from rmipo.fingerprints import has_weights, json_fingerprint, model_fingerprint, text_fingerprint, trained_fingerprint
from rmipo.recipe.settings import merge_settings
from rmipo.record import package_versions

if TYPE_CHECKING:
    from rmipo.generation.reward_model import RewardModel

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
    from rmipo.generation.answers import Generator, Request, check_settings
    from rmipo.generation.scores import read_lines

    settings = merge_settings("reward", DEFAULTS, settings)
    settings["generation"] = check_settings(settings["generation"])
    if settings["model"] is None:
        raise EvaluationError("reward: name one, e.g. --set reward.model=Skywork/Skywork-Reward-V2-Llama-3.1-8B")
    # Before answers are made: a model that isn't there is found out.
    scorer = {"model": settings["model"], "fingerprint": model_fingerprint(settings["model"])}
    reference, reference_path = load_reference(settings["reference"])
    prompts = [row["instruction"] for row in reference[: settings["first_n"]]]
    requests = [Request(str(i), [{"role": "user", "content": prompt}]) for i, prompt in enumerate(prompts)]
    with Generator(model_dir, settings["generation"]) as generator:
        file = generator.file("alpacaeval", requests)
        texts = generator.answer(requests, file)

    rewards = Rewards(settings, scorer | {"dtype": settings["dtype"]}, prompts)
    ours = rewards.of(file, texts)
    metrics = {
        "reward": sum(ours) / len(ours),
        "reward_standard_error": standard_error(ours),
        "reward_length": sum(map(len, texts)) / len(texts),
        "reward_cut": generator.cut,
    }
    for other in sorted(Path(model_dir).resolve().parent.glob(f"*/eval/answers/{file.name}")):
        header, *rows = read_lines(other)
        folder = other.parents[2]
        if folder == Path(model_dir).resolve() or len(rows) < len(prompts):
            continue
        if has_weights(folder) and header["model"] != trained_fingerprint(folder):
            raise EvaluationError(f"{other} has answers of other weights than those now in {folder}. Delete it")
        answers = {row["key"]: row["output"] for row in rows}
        other_texts = [answers[request.key] for request in requests]
        # Padding moves the last bits of a reward: the same answer is a tie whatever they are.
        same = [a == b for a, b in zip(texts, other_texts, strict=True)]
        rate = bootstrap(100 * np.where(same, 0.5, wins(ours, rewards.of(other, other_texts))))
        key = f"reward_wr_vs_{folder.name}"
        metrics |= {key: rate.mean, f"{key}_low": rate.low, f"{key}_high": rate.high}
        metrics[f"{key}_standard_error"] = rate.standard_error
    settings |= {
        "generation": generator.settings,
        "model_fingerprint": scorer["fingerprint"],
        "reference_sha256": text_fingerprint(reference_path.read_bytes()),
    }
    return {
        "metrics": metrics,
        "per_prompt": {"reward": ours},
        "versions": generator.versions | package_versions("transformers", "torch"),
        "settings": settings,
        "fingerprint": generator.fingerprint,
    }


class Rewards:
    """Rewards of files of answers, kept in a file beside each; the reward model is loaded for the first that needs it."""

    def __init__(self, settings: dict, scorer: dict, prompts: list[str]):
        self.settings, self.scorer, self.prompts = settings, scorer, prompts
        self.model: RewardModel | None = None

    def of(self, file: Path, answers: list[str]) -> list[float]:
        from rmipo.generation.reward_model import RewardModel

        identity = self.scorer | {"answers": text_fingerprint(file.read_bytes())}
        kept = file.with_name(f"{file.stem}.rewards-{json_fingerprint(self.scorer)[:8]}.json")
        found = json.loads(kept.read_text()) if kept.is_file() else None
        if found is None or found["identity"] != identity:
            options = (self.settings[key] for key in ("model", "dtype", "batch_size"))
            self.model = self.model or RewardModel(*options)
            dialogues = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                for prompt, text in zip(self.prompts, answers, strict=True)
            ]
            found = {"identity": identity, "rewards": [reward for _, reward in sorted(self.model.score(dialogues))]}
            write_atomically(kept, json.dumps(found) + "\n")
        return found["rewards"]


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
