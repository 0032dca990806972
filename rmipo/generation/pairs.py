"""On-policy preference pairs: prompts -> N answers each -> scores from an oracle -> a chosen and a rejected answer.

A folder of pairs holds, beside the pairs in train.jsonl and test.jsonl:
    answers.jsonl      the answers as they come, see `answers.Generator`
    scores.jsonl       what the oracle says of them, as it comes; pmi.jsonl: their PMI, for the selection `pmi`
    candidates.jsonl   every prompt with all its answers, scores and tokens
    pairs.json         settings, and counts of what was dropped, with reasons; written last
Everything is keyed by a hash of the prompt's messages, so that no answer can come to stand beside another prompt.
"""

import json
import math
import random
from collections import Counter
from dataclasses import asdict, field, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal

import pydantic
from pydantic.dataclasses import dataclass

from rmipo.errors import PairsError
from rmipo.files import locked, read_lines, write_atomically, write_lines
from rmipo.fingerprints import json_fingerprint
from rmipo.generation.answers import Generator, Request
from rmipo.generation.oracles import Likelihood, keep_scores, make_oracle
from rmipo.generation.prompts import Prompt, read_prompts
from rmipo.recipe.files import parse_overrides, read_yaml, typed

RECORD = "pairs.json"


@dataclass(frozen=True, config={"extra": "forbid"})
class PairsConfig:
    """The keys of a pairs.yaml."""

    # Hub id, folder or file; rows with `prompt` or `messages`, or preference pairs, whose prompts are taken.
    prompts: str
    oracle: dict  # see `oracles.ORACLES`
    split: str = "train"  # of a hub id or folder
    answers: Annotated[int, pydantic.Field(ge=2)] = 8  # per prompt
    # best-random: the best against a random one with a lower score. pmi: as best-worst, and among answers of equal score
    # the chosen one has the highest PMI by the policy's own scores, the rejected one the lowest.
    selection: Literal["best-worst", "best-random", "pmi"] = "best-worst"
    min_gap: Annotated[float, pydantic.Field(ge=0)] = 0.0  # between the scores of a pair; ties are kept by pmi alone
    skip_prompts: Annotated[int, pydantic.Field(ge=0)] = 0  # usable prompts left out at the start
    max_prompts: Annotated[int, pydantic.Field(ge=1)] | None = None  # that are taken after those; None: all
    test_share: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1  # of the pairs
    keep_cut: bool = False  # use answers cut at `max_new_tokens` too: a model trained on them learns to end there
    seed: int = 42  # of the answers and of best-random
    generation: dict = field(default_factory=dict)  # over the settings of eval.yaml's block of that name


def load_pairs_config(path: Path, arguments: list[str], prompts: str | None = None) -> PairsConfig:
    """A setting's pairs.yaml, if there is one, with `--key value` arguments and other prompts over it."""
    values = (read_yaml(path) if path.is_file() else {}) | parse_overrides(arguments)
    return typed(PairsConfig, values | ({"prompts": prompts} if prompts else {}), path)


def make_pairs(model_dir: Path, generation: dict, config: PairsConfig, folder: Path) -> dict:
    """Make the pairs of the model in `model_dir`, and return the content of pairs.json.

    What is in `folder` already is not made again. `generation`: settings of the answers, see `recipe.files.GENERATION`; the
    config's own lie over them. Raises PairsError where no pair comes out or `folder` holds others.
    """
    with locked(folder, "OUTPUT"):
        oracle = make_oracle(config.oracle)
        dropped: Counter[str] = Counter()
        limits = {"skip": config.skip_prompts, "limit": config.max_prompts}
        prompts = read_prompts(config.prompts, config.split, model_dir, dropped, **limits)
        if not prompts:
            raise PairsError(f"{config.prompts}: no usable prompt. Dropped: {dict(dropped)}")
        if missing := [name for name in oracle.required if any(name not in prompt.columns for prompt in prompts)]:
            raise PairsError(f"{config.prompts}: rows without {', '.join(missing)}, which the oracle takes")

        settings = generation | config.generation | {"seed": config.seed}
        numbers = range(config.answers)
        requests = [Request(f"{p.key}-{n}", p.messages, seed=config.seed + n) for p in prompts for n in numbers]
        with Generator(model_dir, settings) as generator:
            generator.answer(requests, folder / "answers.jsonl")
        header, *rows = read_lines(folder / "answers.jsonl")
        answers = {row["key"]: row for row in rows}
        candidates = [replace(p, answers=distinct_answers(p, config, answers)) for p in prompts]
        several = [c for c in candidates if len(c.answers) > 1]  # a judge isn't paid for what can't be in a pair
        made_of = {"answers": json_fingerprint(header)}
        scored_by = made_of | {"oracle": oracle.identity}
        scores = keep_scores(folder / "scores.jsonl", scored_by, several, oracle.score, "scores of the oracle")
        pmi: dict[str, float] = {}
        if config.selection == "pmi":
            own = Likelihood(model_dir, generator.settings["dtype"])
            pmi = keep_scores(folder / "pmi.jsonl", made_of, several, own.pmi, "PMI")

        pairs, every = [], []
        for prompt in candidates:
            found = select(prompt, scores, pmi, config)
            if isinstance(found, str):
                dropped[found] += 1
            else:
                sides = dict(zip(("chosen", "rejected"), found, strict=True))
                texts = {side: [{"role": "assistant", "content": prompt.answers[key]}] for side, key in sides.items()}
                rated = {f"score_{side}": scores[key] for side, key in sides.items()}
                pairs.append({"prompt_id": prompt.key, "prompt": prompt.messages, **texts, **rated})
            keys = [f"{prompt.key}-{n}" for n in numbers]
            own_rows = [answers[key] | {"score": scores.get(key), "pmi": pmi.get(key)} for key in keys]
            every.append({"prompt_id": prompt.key, "prompt": prompt.messages, "answers": own_rows})
        write_lines(folder / "candidates.jsonl", every)
        cut = generator.finishes.count("length")
        if not pairs:
            raise PairsError(f"{folder}: no pair came out: {dict(dropped)}; {cut} of {len(requests)} answers are cut")
        # The hash of its prompt decides whether a pair is held out, and not its place: the shortest prompts come first.
        hashes = sorted(pair["prompt_id"] for pair in pairs)
        held_out = set(hashes[: math.ceil(config.test_share * len(pairs))])
        write_lines(folder / "train.jsonl", [pair for pair in pairs if pair["prompt_id"] not in held_out])
        write_lines(folder / "test.jsonl", [pair for pair in pairs if pair["prompt_id"] in held_out])
        result = {
            "settings": asdict(config) | {"generation": generator.settings},
            "model": {"folder": str(model_dir), "fingerprint": generator.fingerprint},
            "oracle": oracle.identity,
            "prompts": len(prompts),
            "pairs": len(pairs),
            "answers": len(requests),
            "cut": cut,
            "dropped": dict(dropped),
            "mean_score": mean(scores.values()),
            "best_score": mean(max(scores[key] for key in c.answers) for c in several),
        }
        write_atomically(folder / RECORD, json.dumps(result, indent=2) + "\n")
        return result


def distinct_answers(prompt: Prompt, config: PairsConfig, answers: dict[str, dict]) -> dict[str, str]:
    """By key: the answers that are not empty and, unless `keep_cut`, whole; each text once."""
    texts: dict[str, str] = {}
    for key in (f"{prompt.key}-{n}" for n in range(config.answers)):
        text, whole = answers[key]["output"], answers[key]["finish"] != "length"
        if text and text not in texts.values() and (config.keep_cut or whole):
            texts[key] = text
    return texts


def select(
    prompt: Prompt, scores: dict[str, float], pmi: dict[str, float], config: PairsConfig
) -> tuple[str, str] | str:
    """Keys of the chosen and the rejected answer, or why there is no pair."""
    keys = list(prompt.answers)
    if len(keys) < 2:
        return "fewer than two answers differ and are neither empty nor cut"
    # Without PMI the first of equal scores is taken.
    best = max(keys, key=lambda key: (scores[key], pmi.get(key, 0)))
    worst = min(keys, key=lambda key: (scores[key], pmi.get(key, 0)))
    gap = scores[best] - scores[worst]
    if gap == 0 and config.selection != "pmi":
        return "all answers have the same score"
    if gap < config.min_gap or best == worst:
        return f"the scores differ by less than {config.min_gap}"
    if config.selection == "best-random":
        lower = [k for k in keys if scores[k] < scores[best] and scores[best] - scores[k] >= config.min_gap]
        return best, random.Random(f"{config.seed} {prompt.key}").choice(lower)
    return best, worst
