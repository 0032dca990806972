"""Scores of answers, kept in a file as they come, so that no answer is scored twice."""

import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from rmipo.errors import PairsError
from rmipo.generation.prompts import Prompt


def keep_scores(path: Path, header: dict, prompts: list[Prompt], score, description: str) -> dict[str, float]:
    """Scores by answer key, kept in `path`; those that are there are not asked for again.

    Raises PairsError if the file holds scores of other answers or another oracle.
    """
    # The first line says what the scores are of, so that those of an older oracle are not taken for these.
    found, *lines = read_lines(path) or [None]
    if found is None:
        path.write_text(json.dumps(header) + "\n")
    elif found != json.loads(json.dumps(header)):
        raise PairsError(f"{path} holds scores of other answers or of another oracle: delete it to score again")
    scores = {key: value for line in lines for key, value in line.items()}
    rest = [{key: text for key, text in p.answers.items() if key not in scores} for p in prompts]
    missing = [replace(p, answers=answers) for p, answers in zip(prompts, rest, strict=True) if answers]
    total = sum(len(p.answers) for p in prompts)
    with path.open("a") as file, tqdm(total=total, initial=len(scores), desc=description, unit="answer") as progress:
        for some in score(missing) if missing else ():
            file.write(json.dumps(some) + "\n")
            file.flush()
            scores |= some
            progress.update(len(some))
    return scores


def read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file; one that a kill cut short is removed from it."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return [json.loads(line) for line in content[:end].splitlines()]
