"""Scores of answers, kept in a file as they come, so that no answer is scored twice."""

import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from rmipo.errors import PairsError
from rmipo.generation.oracles import Candidates


def fill(path: Path, header: dict, prompts: list[Candidates], score, description: str) -> dict[str, float]:
    """Scores by answer key, kept in `path`; those that are there are not asked for again.

    Raises PairsError if the file holds scores of other answers or another oracle.
    """
    lines = list(read_lines(path))
    if lines and lines[0] != json.loads(json.dumps(header)):
        raise PairsError(
            f"{path} holds scores of other answers or of another oracle ({lines[0]}). Delete it to score again"
        )
    if not lines:
        path.write_text(json.dumps(header) + "\n")
    scores = {key: value for line in lines[1:] for key, value in line.items()}
    missing = [
        Candidates(p.key, p.messages, rest, p.columns)
        for p in prompts
        if (rest := {key: text for key, text in p.answers.items() if key not in scores})
    ]
    total = sum(len(p.answers) for p in prompts)
    if missing:
        with (
            path.open("a") as file,
            tqdm(total=total, initial=len(scores), desc=description, unit="answer") as progress,
        ):
            for some in score(missing):
                file.write(json.dumps(some) + "\n")
                file.flush()
                scores |= some
                progress.update(len(some))
    return scores


class PmiScores:
    """The policy's own PMI, as an oracle is called."""

    def __init__(self, model_dir: Path, dtype: str):
        self.source = model_dir, dtype

    def score(self, prompts: list[Candidates]) -> Iterator[dict[str, float]]:
        from rmipo.generation.likelihood import Likelihood

        likelihood = Likelihood(*self.source)
        for prompt in prompts:
            yield dict(zip(prompt.answers, likelihood.pmi(prompt.messages, list(prompt.answers.values())), strict=True))


def read_lines(path: Path) -> Iterator[dict]:
    """The lines of a JSONL file; one that a kill cut short is removed from it."""
    if path.is_file():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
        yield from map(json.loads, content[:end].splitlines())
