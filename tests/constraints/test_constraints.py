"""The verifiable task: prompts that can be made again, a test split that shares nothing, checks on hand-made answers."""

import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from rmipo.constraints.instructions import DRAWN, followed, score
from rmipo.constraints.prompts import make_prompts, read_prompts
from tests.helpers.paths import ROOT


def names(row: dict) -> tuple[str, ...]:
    return tuple(sorted(constraint["id"] for constraint in row["constraints"]))


def test_the_shipped_prompts_are_what_the_program_makes():
    assert make_prompts() == {split: read_prompts(split) for split in ("train", "test")}


def test_test_prompts_share_neither_tasks_nor_combinations_with_training():
    splits = {split: read_prompts(split) for split in ("train", "test")}
    tasks = {split: {row["prompt"].split("\n")[0] for row in rows} for split, rows in splits.items()}
    pairs = {split: {names(row) for row in rows} for split, rows in splits.items()}
    assert len(tasks["train"]) == 600 and len(tasks["test"]) == 300
    assert not tasks["train"] & tasks["test"] and not pairs["train"] & pairs["test"]
    assert all(len(combination) == 2 for combination in pairs["test"])
    assert {name for combination in pairs["test"] for name in combination} == set(DRAWN)


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"),
    [
        ("punctuation:no_comma", {}, "No comma here.", "One, here."),
        ("detectable_format:title", {}, "<<Rain>> It falls.", "Rain. It falls."),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hello.\nP.S. Bye.", "Hello. Bye."),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [place]", "[name]"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and b"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Section", "num_sections": 2},
            "Section 1\na\nSection 2\nb",
            "Section 1\na",
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\nb"),
        (
            "keywords:frequency",
            {"keyword": "sea", "frequency": 2, "relation": "at least"},
            "The sea, the sea.",
            "The sea.",
        ),
        (
            "keywords:letter_frequency",
            {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
            "A zoo.",
            "A zoo of zebras.",
        ),
    ],
)
def test_hand_made_answers(name, arguments, right, wrong):
    filled_up = {"arguments": {**arguments, "of_another_row": None}, "id": name}  # as tables of rows fill it up
    assert name in DRAWN
    assert [followed([filled_up], answer) for answer in (right, wrong, "", "  ")] == [[True], [False], [False], [False]]


def test_score_is_the_share_of_constraints():
    constraints = [{"id": "punctuation:no_comma", "arguments": {}}, {"id": "detectable_format:title", "arguments": {}}]
    assert score([], ["<<Both>>", "One.", "None, here", ""], constraints) == [1.0, 0.5, 0.0, 0.0]


def test_nothing_is_said_of_a_download():
    code = "from rmipo.constraints.instructions import registry; assert registry().INSTRUCTION_DICT"
    environment = {"PYTHONPATH": str(ROOT), "NLTK_DATA": "/nowhere", "HOME": "/nowhere", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "") and "nltk" not in done.stderr.lower()
