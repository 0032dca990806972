"""Scores by a reward model, a sequence classifier; tables compare two methods by them, prompt by prompt.

Free and deterministic, and no stand-in for AlpacaEval: it says what this reward model prefers.
"""

from pathlib import Path
from statistics import mean

from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca import load_reference
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.statistics import means
from rmipo.fingerprints import json_fingerprint, model_fingerprint, text_fingerprint

DEFAULTS = {
    "generation": {},
    "model": None,  # hub id or folder of a sequence classifier with one output and a chat template
    "reference": None,  # prompts, as for AlpacaEval; None: AlpacaEval's own
    "first_n": None,  # prompts
    "dtype": "bfloat16",
}


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict:
    """Score the answers of the model in `model_dir`: `reward` is their mean, `reward_length` their mean characters.

    Answers are those of AlpacaEval where both have the same prompts and decoding; rewards are kept beside them.
    """
    from rmipo.generation.answers import Generator, questions
    from rmipo.generation.oracles import keep_scores, make_oracle
    from rmipo.generation.prompts import Prompt

    if settings["model"] is None:
        raise EvaluationError("reward: name one, e.g. --set reward.model=Skywork/Skywork-Reward-V2-Llama-3.1-8B")
    # Before answers are made: a model that isn't there is found out.
    settings["model_fingerprint"] = model_fingerprint(settings["model"])
    reference, settings["reference_sha256"] = load_reference(settings["reference"])
    requests = questions(row["instruction"] for row in reference[: settings["first_n"]])
    with Generator(model_dir, settings["generation"]) as generator:
        file = generator.file("alpacaeval", requests)
        texts = generator.answer(requests, file)
    oracle = make_oracle({"reward_model": settings["model"], "dtype": settings["dtype"]})
    answered = [Prompt(r.key, r.messages, {r.key: text}) for r, text in zip(requests, texts, strict=True)]
    # The name says which reward model scored which answers: others have a file of their own.
    of = {"fingerprint": settings["model_fingerprint"], "dtype": settings["dtype"]}
    of["answers"] = text_fingerprint(file.read_bytes())
    kept = file.with_name(f"{file.stem}-{json_fingerprint(of)[:8]}.rewards")
    scores = keep_scores(kept, of, answered, oracle.score, "rewards")
    per_prompt = {"reward": [scores[request.key] for request in requests]}
    metrics = means(per_prompt) | {"reward_length": mean(map(len, texts)), "reward_cut": generator.cut}
    return generator.result(metrics, settings, per_prompt=per_prompt)


BENCHMARK = Benchmark(
    name="reward",
    title="Reward model",
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "reward": Metric("Reward", digits=2),
        "reward_cut": Metric("Cut (%)", better=None),
    },
    same=("model", "model_fingerprint", "reference_sha256", "first_n", "dtype"),
    same_per_model=DECODING,
    trial=("first_n", "reference"),
)
