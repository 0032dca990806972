"""Short tasks with a verifiable constraint, written beside this file: `python -m rmipo.constraints.prompts` makes them again.

tasks.txt has a task per line with the keywords of which a right answer has one. It also has a word of the question's subject:
without that a text could name the keywords of many tasks. No task is in both splits.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent
TRAIN = 600
SEED = 42
WORDS = 60  # of an answer, at most
COMMON = 4  # tasks; a word of more says nothing about which of them was answered


def make_prompts() -> dict[str, list[dict]]:
    """Rows per split: `prompt`, `keywords` and `subject` (a right answer has one of each) and `constraints`."""
    from rmipo.constraints.instructions import DRAWN, registry  # needs lm-eval; reading the prompts doesn't

    lines = (FOLDER / "tasks.txt").read_text().splitlines()
    tasks = [(question, keywords.split(" / ")) for question, _, keywords in (line.partition(" | ") for line in lines)]
    random.seed(SEED)  # the instructions draw their arguments from the module's own stream
    random.shuffle(tasks)
    trained = {keywords[0] for _, keywords in tasks[:TRAIN]}
    # A task with the keyword of a training task may be the same in other words.
    splits = {"train": tasks[:TRAIN], "test": [task for task in tasks[TRAIN:] if task[1][0] not in trained]}
    tasks_with = Counter(word for question, _ in tasks for word in words_of(question))
    rows: dict[str, list[dict]] = {split: [] for split in splits}
    for split, some in splits.items():
        for question, keywords in some:
            name = random.choice(DRAWN)
            instruction = registry().INSTRUCTION_DICT[name](name)
            description = instruction.build_description()
            # The question comes last: a small model answers it more often than one before the constraint.
            prompt = f"{description}\nAnswer in at most {WORDS} words: {question}"
            constraints = [{"id": name, "arguments": instruction.get_instruction_args() or {}}]
            rarest = min(tasks_with[word] for word in words_of(question))
            subject = sorted(word for word in words_of(question) if tasks_with[word] <= max(COMMON, rarest))
            row = {"prompt": prompt, "keywords": keywords, "subject": subject, "constraints": constraints}
            rows[split].append(row)
    return rows


def words_of(question: str) -> set[str]:
    return {*re.findall(r"[a-z]{3,}", question.lower())}


def read_prompts(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    for split, rows in make_prompts().items():
        (FOLDER / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
