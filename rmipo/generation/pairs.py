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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rmipo.errors import PairsError
from rmipo.files import write_atomically, write_lines
from rmipo.fingerprints import json_fingerprint
from rmipo.generation.answers import Generator, Request, read_answers
from rmipo.generation.oracles import Candidates, make_oracle
from rmipo.generation.prompts import Prompt, read_prompts
from rmipo.generation.scores import PmiScores, fill
from rmipo.recipe.files import coerce, parse_overrides, read_yaml
from rmipo.run.lock import locked

RECORD = "pairs.json"
SELECTIONS = ("best-worst", "best-random", "pmi")
LOWEST = {"answers": 2, "min_gap": 0, "skip_prompts": 0, "max_prompts": 1, "max_prompt_tokens": 1, "test_share": 0}


@dataclass(frozen=True)
class PairsConfig:
    """The keys of a pairs.yaml.

    Args:
        prompts: hub id, folder or file; rows with `prompt` or `messages`, or preference pairs, whose prompts are taken.
        split: of a hub id or folder.
        oracle: see `oracles.ORACLES`.
        answers: per prompt.
        selection: best-worst: the answers with the highest and the lowest score. best-random: the best against a random
            one with a lower score. pmi: as best-worst, and among answers of equal score the chosen one has the highest
            PMI, the rejected one the lowest, by the policy's own scores; all answers may have the same score.
        min_gap: between the scores of a pair. Ties are dropped whatever it is, except by pmi.
        skip_prompts, max_prompts: usable prompts that are left out at the start, and how many are then taken; None: all.
        max_prompt_tokens: longer prompts are dropped; None: those without room for an answer in the model's window.
        test_share: of the pairs that become test.jsonl; which, a hash of their prompt decides.
        keep_cut: use answers that were cut at `max_new_tokens` too. A model that is trained on them learns to end there.
        seed: of the answers and of best-random.
        generation: over the settings of eval.yaml's block of that name.
    """

    prompts: str
    oracle: dict
    split: str = "train"
    answers: int = 8
    selection: str = "best-worst"
    min_gap: float = 0.0
    skip_prompts: int = 0
    max_prompts: int | None = None
    max_prompt_tokens: int | None = None
    test_share: float = 0.1
    keep_cut: bool = False
    seed: int = 42
    generation: dict = field(default_factory=dict)

    @classmethod
    def load(cls, values: dict, where: str) -> "PairsConfig":
        """Raises PairsError that lists everything that is wrong."""
        annotations = cls.__annotations__
        problems = [
            f"{key} is not a key of it; keys are {', '.join(annotations)}" for key in values if key not in annotations
        ]
        problems += [f"{key} is missing" for key in ("prompts", "oracle") if not values.get(key)]
        sound = {}
        for key in [key for key in values if key in annotations]:
            try:
                sound[key] = coerce(values[key], annotations[key])
            except ValueError as error:
                problems.append(f"{key} is {values[key]!r}: {error}")
        if sound.get("selection", "best-worst") not in SELECTIONS:
            problems.append(f"selection is {sound['selection']!r}: expected one of {', '.join(SELECTIONS)}")
        problems += [
            f"{key} is {sound[key]}: expected at least {low}"
            for key, low in LOWEST.items()
            if sound.get(key) is not None and sound[key] < low
        ]
        if sound.get("test_share", 0) >= 1:
            problems.append(f"test_share is {sound['test_share']}: expected less than 1")
        if problems:
            raise PairsError("\n  ".join([f"{where}:", *problems]))
        return cls(**sound)


def load_pairs_config(path: Path, arguments: list[str], prompts: str | None = None) -> PairsConfig:
    """A setting's pairs.yaml, if there is one, with `--key value` arguments and other prompts over it."""
    values = read_yaml(path) if path.is_file() else {}
    try:
        values |= parse_overrides(arguments)
    except ValueError as error:
        raise PairsError(f"{path}: {error}") from error
    return PairsConfig.load(values | ({"prompts": prompts} if prompts else {}), str(path))


def make_pairs(model_dir: Path, generation: dict, config: PairsConfig, folder: Path) -> dict:
    """Make the pairs of the model in `model_dir`; what is in `folder` already is not made again.

    Args:
        generation: settings of the answers, see `answers.DEFAULTS`; the config's own lie over them.

    Returns:
        The content of pairs.json: `settings`, `prompts`, `pairs`, `answers`, `cut` (how many of them), `dropped` (reason ->
        count of prompts), `mean_score`, `best_score`.

    Raises:
        PairsError: no pair comes out, or `folder` holds others. OracleError, EvaluationError, DataError: of the parts.
        CheckpointError: another program makes pairs there.
    """
    with locked(folder, "OUTPUT"):
        return _make_pairs(model_dir, generation, config, folder)


def _make_pairs(model_dir: Path, generation: dict, config: PairsConfig, folder: Path) -> dict:
    oracle = make_oracle(config.oracle)
    dropped: Counter[str] = Counter()
    prompts = read_prompts(
        config.prompts,
        config.split,
        model_dir,
        dropped,
        skip=config.skip_prompts,
        limit=config.max_prompts,
        max_tokens=config.max_prompt_tokens,
    )
    if not prompts:
        skipped = f" after the first {config.skip_prompts}" * bool(config.skip_prompts)
        raise PairsError(f"{config.prompts}: no usable prompt{skipped}. Dropped: {dict(dropped)}")
    if missing := [name for name in oracle.required if any(name not in prompt.columns for prompt in prompts)]:
        raise PairsError(
            f"{config.prompts}: rows without {', '.join(missing)}, which the oracle {oracle.name} takes. Add the column, "
            "or name another oracle, such as --oracle.function my_oracle.py:score"
        )
    settings = generation | config.generation | {"seed": config.seed}
    requests = [
        Request(f"{p.key}-{n}", p.messages, seed=config.seed + n) for p in prompts for n in range(config.answers)
    ]
    with Generator(model_dir, settings) as generator:
        generator.answer(requests, folder / "answers.jsonl")
    header, answers = read_answers(folder / "answers.jsonl")
    candidates = [Candidates(p.key, p.messages, distinct_answers(p, config, answers), p.columns) for p in prompts]
    several = [c for c in candidates if len(c.answers) > 1]
    made_of = {"answers": json_fingerprint(header)}

    scores = fill(
        folder / "scores.jsonl", made_of | {"oracle": oracle.identity}, several, oracle.score, "scores of the oracle"
    )
    pmi: dict[str, float] = {}
    if config.selection == "pmi":
        own = PmiScores(model_dir, generator.settings["dtype"])
        pmi = fill(folder / "pmi.jsonl", made_of, several, own.score, "PMI")
    pairs = []
    for prompt in candidates:
        chosen_rejected = select(prompt, scores, pmi, config)
        if isinstance(chosen_rejected, str):
            dropped[chosen_rejected] += 1
        else:
            pairs.append(pair_row(prompt, *chosen_rejected, scores))
    write_lines(
        folder / "candidates.jsonl", (candidate_row(c, config.answers, answers, scores, pmi) for c in candidates)
    )
    cut = generator.finishes.count("length")
    if not pairs:
        raise PairsError(
            f"{folder}: no pair came out of {len(prompts)} prompts: {dict(dropped)}; {cut} of {len(requests)} answers are cut "
            f"at generation.max_new_tokens ({generator.settings['max_new_tokens']}). See candidates.jsonl"
        )
    by_hash = sorted(pairs, key=lambda pair: pair["prompt_id"])
    held_out = {pair["prompt_id"] for pair in by_hash[: math.ceil(config.test_share * len(pairs))]}
    for split in ("train", "test"):
        chosen = [pair for pair in pairs if (pair["prompt_id"] in held_out) == (split == "test")]
        write_lines(folder / f"{split}.jsonl", chosen)
    best = [max(scores[key] for key in c.answers) for c in several]
    result = {
        "settings": asdict(config) | {"generation": generator.settings},
        "model": {"folder": str(model_dir), "fingerprint": generator.fingerprint},
        "oracle": oracle.identity,
        "prompts": len(prompts),
        "pairs": len(pairs),
        "answers": len(requests),
        "cut": cut,
        "dropped": dict(dropped),
        "mean_score": sum(scores.values()) / len(scores),
        "best_score": sum(best) / len(best),
    }
    write_atomically(folder / RECORD, json.dumps(result, indent=2) + "\n")
    return result


def distinct_answers(prompt: Prompt, config: PairsConfig, answers: dict[str, dict]) -> dict[str, str]:
    """By key: the answers that are not empty and, unless `keep_cut`, whole; each text once."""
    texts: dict[str, str] = {}
    for n in range(config.answers):
        answer = answers[f"{prompt.key}-{n}"]
        text = answer["output"]
        if text and text not in texts.values() and (config.keep_cut or answer["finish"] != "length"):
            texts[f"{prompt.key}-{n}"] = text
    return texts


def select(
    prompt: Candidates, scores: dict[str, float], pmi: dict[str, float], config: PairsConfig
) -> tuple[str, str] | str:
    """Keys of the chosen and the rejected answer, or why there is no pair."""
    keys = list(prompt.answers)
    if len(keys) < 2:
        return "fewer than two answers differ and are neither empty nor cut"
    best = max(keys, key=lambda key: (scores[key], pmi.get(key, 0)))
    worst = min(keys, key=lambda key: (scores[key], pmi.get(key, 0)))
    lower = [k for k in keys if scores[k] < scores[best] and scores[best] - scores[k] >= config.min_gap]
    if config.selection == "pmi":
        enough = scores[best] - scores[worst] >= config.min_gap and best != worst
        return (best, worst) if enough else f"the scores differ by less than {config.min_gap}"
    if not lower:
        tie = scores[best] == scores[worst]
        return "all answers have the same score" if tie else f"the scores differ by less than {config.min_gap}"
    if config.selection == "best-random":
        return best, random.Random(f"{config.seed} {prompt.key}").choice(lower)
    return best, worst


def pair_row(prompt: Candidates, chosen: str, rejected: str, scores: dict[str, float]) -> dict:
    sides = {"chosen": chosen, "rejected": rejected}
    responses = {side: [{"role": "assistant", "content": prompt.answers[key]}] for side, key in sides.items()}
    numbers = {f"score_{side}": scores[key] for side, key in sides.items()}
    return {"prompt_id": prompt.key, "prompt": prompt.messages, **responses, **numbers}


def candidate_row(
    prompt: Candidates, number: int, answers: dict, scores: dict[str, float], pmi: dict[str, float]
) -> dict:
    rows = [answers[f"{prompt.key}-{n}"] for n in range(number)]
    rows = [{**row, "score": scores.get(row["key"]), "pmi": pmi.get(row["key"])} for row in rows]
    return {"prompt_id": prompt.key, "prompt": prompt.messages, "answers": rows}
