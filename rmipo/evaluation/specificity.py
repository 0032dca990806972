"""How much answers say about their prompt: the paper's claim that mutual information guards against boilerplate, measured.

The model answers K held-out prompts. A frozen model, the one that training started from, scores every answer under every
prompt. An answer that fits any prompt is as likely under the others as under its own.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import means, repeated_share
from rmipo.files import write_lines
from rmipo.fingerprints import model_fingerprint
from rmipo.launch.choices import initial_model

DEFAULTS = {
    "prompts": "rmipo/constraints/test.jsonl",  # hub id, folder or file, as for `make pairs`
    "split": "test",  # of a hub id or folder
    "first_n": 64,  # K: the cost grows with its square
    "initial": None,  # folder of the frozen model; that of the training's recipe if null, else the model itself
    "generation": {},
}


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict:
    """Answer the prompts, score them, and write the numbers of each answer to `output_dir`/specificity.jsonl."""
    from rmipo.generation.answers import Generator, Request
    from rmipo.generation.oracles import Likelihood
    from rmipo.generation.prompts import read_prompts

    settings["initial"] = initial_model(model_dir, settings["initial"])
    settings["initial_fingerprint"] = model_fingerprint(settings["initial"])  # one model may lie in several folders
    dropped: Counter[str] = Counter()
    prompts = read_prompts(settings["prompts"], settings["split"], model_dir, dropped, limit=settings["first_n"])
    if len(prompts) < 2:
        raise EvaluationError(f"specificity.prompts: too few are usable. Dropped: {dict(dropped)}")
    messages = [prompt.messages for prompt in prompts]
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.ask("specificity", [Request(prompt.key, prompt.messages) for prompt in prompts])
    frozen = Likelihood(settings["initial"], generator.settings["dtype"])
    scores = score_answers(frozen, messages, answers)
    own = scores["logp"]
    if settings["initial_fingerprint"] != generator.fingerprint:
        policy = Likelihood(model_dir, generator.settings["dtype"])
        pairs = [policy.ids(*asked) for asked in zip(messages, answers, strict=True)]
        own = [policy.sums(context, [ids])[0] for context, ids in pairs]
    scores["kl"] = own - scores["logp"]
    write_lines(output_dir / "specificity.jsonl", scores.assign(prompt=messages, answer=answers).to_dict("records"))

    per_prompt = {"specificity": 100.0 * scores["own"], "pmi": scores["pmi"], "kl_initial": scores["kl"]}
    per_prompt = {name: values.tolist() for name, values in per_prompt.items()}
    tokens = scores["tokens"].sum()
    metrics = means(per_prompt) | {"pmi_bound": math.log(len(scores)), "tokens": tokens / len(scores)}
    # Per token: sums over sums.
    metrics |= {f"{name}_token": scores[name].sum() / tokens for name in ("pmi", "prior_pmi")}
    metrics["repetition"] = 100 * repeated_share([frozen.chat.tokenizer(a)["input_ids"] for a in answers])
    metrics["specificity_cut"] = generator.cut
    return generator.result(metrics, settings, per_prompt=per_prompt)


def score_answers(frozen, prompts: list[list[dict]], answers: list[str]) -> pd.DataFrame:
    """A row for each answer, under the frozen model, a `Likelihood`: logp, tokens, and

    own: whether no other prompt gives it as high a likelihood as its own
    pmi: log p(y|x) - log mean_j p(y|x_j) over the K prompts, in nats: at most log K, and its mean is the InfoNCE
        bound on the mutual information of prompts and answers
    prior_pmi: log p(y|x) - log p(y), p(y) after the generation header alone, as RMiPO's margin has it
    """
    from tqdm import tqdm

    pairs = [frozen.ids(messages, answer) for messages, answer in zip(prompts, answers, strict=True)]
    responses = [ids for _, ids in pairs]
    longest = max(len(context) for context, _ in pairs) + max(map(len, responses))
    if longest > frozen.window:  # every answer is scored after every prompt
        both = "the longest prompt and answer together"
        raise EvaluationError(f"specificity: {both} have {longest} tokens, the frozen model's context {frozen.window}")
    contexts = tqdm([context for context, _ in pairs], desc="specificity", unit="prompt")
    under = np.array([frozen.sums(context, responses) for context in contexts])  # (prompts, answers)
    logp, count = under.diagonal(), len(answers)
    others = np.where(np.eye(count, dtype=bool), -np.inf, under).max(axis=0)
    pmi = logp - np.logaddexp.reduce(under) + math.log(count)
    prior_pmi = logp - frozen.sums(frozen.prior_context, responses)
    tokens = list(map(len, responses))
    return pd.DataFrame({"own": logp > others, "pmi": pmi, "prior_pmi": prior_pmi, "logp": logp, "tokens": tokens})


BENCHMARK = Benchmark(
    name="specificity",
    title="Specificity",
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "specificity": Metric("Own prompt most likely (%)"),
        "pmi": Metric("PMI (nats)", 2),
        "pmi_token": Metric("PMI (nats per token)", 3),
        "prior_pmi_token": Metric("PMI by log pi(y) (nats per token)", 3),
        "tokens": Metric("Tokens", better=None),
        "specificity_cut": Metric("Cut (%)", better=None),
        "repetition": Metric("Repeated 4-grams (%)", better=False),
        "kl_initial": Metric("KL to the initial model (nats)", 2, better=None),
    },
    same=("prompts", "split", "first_n", "initial_fingerprint", "generation.temperature", "generation.max_new_tokens"),
    trial=("first_n",),
)
