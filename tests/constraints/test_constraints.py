"""The verifiable task: prompts that can be made again, a test split that shares nothing, checks on hand-made answers."""

import pytest

pytest.importorskip("lm_eval")

from rmipo.constraints.instructions import DRAWN, answered, followed, score, solved
from rmipo.constraints.prompts import make_prompts, read_prompts


def test_the_shipped_prompts_are_what_the_program_makes_no_task_is_in_two_splits_and_no_prompt_has_its_keywords():
    splits = {split: read_prompts(split) for split in ("train", "test")}
    assert splits == make_prompts()
    assert [len({row["prompt"].split("\n")[-1] for row in rows}) for rows in splits.values()] == [600, 573]
    answers = [{row["keywords"][0] for row in rows} for rows in splits.values()]
    assert not answers[0] & answers[1]
    for row in (*splits["train"], *splits["test"]):
        question = row["prompt"].split(" words: ")[1]
        assert not answered({**row, "subject": [""]}, question) and row["keywords"] and row["subject"]
        assert all(word in question.lower() for word in row["subject"])
    assert {row["constraints"][0]["id"] for row in splits["test"]} == set(DRAWN)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Honey is what bees make.", True),
        ("A bee's syrup", True),
        ("bees make HONEYCOMBS", False),  # another word
        ("Honey", False),  # names no bees: as good for any question
        ("Bees make wax", False),
        (" ".join(["bees honey", *["x"] * 58]), True),
        (" ".join(["bees honey", *["x"] * 59]), False),  # 61 words
    ],
)
def test_an_answer_has_a_keyword_and_a_word_of_the_subject_in_sixty_words(answer, right):
    assert answered({"keywords": ["honey", "a bee's syrup"], "subject": ["bee", "make"]}, answer) is right


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"),
    [
        ("punctuation:no_comma", {}, "No comma here.", "One, here."),
        ("detectable_format:title", {}, "<<Rain>> It falls.", "Rain. It falls."),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
        ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea, sea.", "Sea."),
    ],
)
def test_hand_made_answers(name, arguments, right, wrong):
    filled_up = {"arguments": {**arguments, "of_another_row": None}, "id": name}  # as tables of rows fill it up
    assert name in DRAWN
    assert [followed([filled_up], answer) for answer in (right, wrong, "", "  ")] == [[True], [False], [False], [False]]


def test_score_is_the_share_of_what_is_asked_and_solved_is_all_of_it():
    row = {"keywords": ["honey"], "subject": ["bees"], "constraints": [{"id": "punctuation:no_comma", "arguments": {}}]}
    answers = ["Bees: honey", "Bees, honey", "Honey", "honey, yes", ""]
    assert score([], answers, row["constraints"], row["keywords"], row["subject"]) == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert [solved(row, answer) for answer in answers] == [True, False, False, False, False]
