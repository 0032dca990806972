"""Prompts with verifiable constraints, written beside this file: `python -m rmipo.constraints.prompts` makes them again.

The test prompts have other tasks than the training prompts, and pairs of constraints that never occur together there.
"""

import itertools
import json
import random
from pathlib import Path

from rmipo.recipe.files import read_yaml

FOLDER = Path(__file__).parent
SIZES = {"train": 600, "test": 300}
SEED = 42
TEST_COMBINATIONS = 0.4  # share of the pairs of constraints that only the test prompts have
SINGLE = 0.5  # share of the training prompts with one constraint


def make_prompts() -> dict[str, list[dict]]:
    """Per split: rows of `prompt` (text) and `constraints` (`{"id", "arguments"}`)."""
    from rmipo.constraints.instructions import DRAWN, registry  # needs lm-eval; reading the prompts doesn't

    draw = random.Random(SEED)
    conflicts = registry().conflict_make(registry().INSTRUCTION_CONFLICTS)
    pairs = [pair for pair in itertools.combinations(DRAWN, 2) if pair[1] not in conflicts[pair[0]]]
    draw.shuffle(pairs)
    held_out = round(TEST_COMBINATIONS * len(pairs))
    combinations = {"test": pairs[:held_out], "train": pairs[held_out:]}
    random.seed(SEED)  # the instructions draw their arguments from the module's own stream
    rows = {}
    for split, tasks in read_yaml(FOLDER / "tasks.yaml").items():
        texts = [form.format(topic=topic) for form in tasks["forms"] for topic in tasks["topics"]]
        rows[split] = []
        for text in draw.sample(texts, SIZES[split]):
            single = split == "train" and draw.random() < SINGLE
            names = (draw.choice(DRAWN),) if single else draw.choice(combinations[split])
            instructions = [registry().INSTRUCTION_DICT[name](name) for name in names]
            descriptions = [instruction.build_description() for instruction in instructions]
            arguments = [instruction.get_instruction_args() or {} for instruction in instructions]
            constraints = [{"id": n, "arguments": a} for n, a in zip(names, arguments, strict=True)]
            rows[split].append({"prompt": "\n".join([text, *descriptions]), "constraints": constraints})
    return rows


def read_prompts(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    for split, rows in make_prompts().items():
        (FOLDER / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
