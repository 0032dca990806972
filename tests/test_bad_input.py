"""Every bad input of the table ends with one message that says what was found and what to change; no model is made.

WRITE_TABLE=1 .venv/bin/python -m pytest tests/test_bad_input.py     rewrites the table in docs/BAD_INPUT.md, and
its counts in docs/RELIABILITY.md
"""

import collections
import os
import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.helpers.bad_input import CASES, Bench
from tests.helpers.paths import ROOT

PAGE, SUMMARY = ROOT / "docs" / "BAD_INPUT.md", ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- bad inputs: begin -->\n", "<!-- bad inputs: end -->\n"
HEAD = """# Bad input

What is refused, and what the program says. Written by its test, which fails when a message changes:

    WRITE_TABLE=1 .venv/bin/python -m pytest -n 0 tests/test_bad_input.py

| area | input | what the program says |
|---|---|---|
"""
SHOWN, LINES = 260, 4  # of a message: characters, and lines before the lists of what there is
ROWS: list[str] = []


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(pristine, tmp_path, monkeypatch, request):
    """A fresh copy of the bench, in which no model can be made. (Planning makes some, without weights.)"""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(pristine.folder / name)
    fresh = object.__new__(Bench)
    fresh.folder = tmp_path

    def made(self, *arguments, **keywords):
        raise AssertionError("a model was made before the input was refused")

    if request.getfixturevalue("case").area not in ("device", "plan"):
        monkeypatch.setattr(PreTrainedModel, "__init__", made)
    return fresh


def row(case, message: str, folder: Path) -> str:
    shown = message.replace(str(folder), "FOLDER").replace(f"{ROOT}/", "")
    shown = re.sub(r"'?https?://[^ ']+'?", "the hub", " / ".join(map(str.strip, shown.split("\n")[:LINES])))
    shown = re.sub(r"\d+ GiB are free", "N GiB are free", shown)  # of the machine that writes the table
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    cells = (case.area, case.what, shown.replace("|", "\\|").replace("<", "&lt;"))
    return f"| {' | '.join(cells)} |\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.what}"[:60])
def test_bad_input(case, bench):
    message = case.run(bench)
    for part in case.said:
        assert part in message
    line = row(case, message, bench.folder)
    if os.environ.get("WRITE_TABLE"):
        ROWS.append(line)
    else:
        assert line in PAGE.read_text(), f"docs/BAD_INPUT.md is not current; how to write it: {__doc__}"


def test_the_table_has_these_rows_and_no_others():
    names = collections.Counter((case.area, case.what) for case in CASES)
    assert len(names) == len(CASES) >= 60
    areas = collections.Counter(case.area for case in CASES)
    counts = f"{len(CASES)} inputs: {', '.join(f'{count} {area}' for area, count in areas.items())}.\n"
    before, _, rest = SUMMARY.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text(HEAD + "".join(ROWS))
        SUMMARY.write_text(before + BEGIN + counts + END + after)
        shown = counts
    assert PAGE.read_text().count("\n| ") == len(CASES) + 1
    assert shown == counts
