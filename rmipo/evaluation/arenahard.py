"""Arena-Hard v2: answers in the format of its repository, whose own programs judge and score them.

github.com/lmarena/arena-hard-auto is no package, and its judge prompts and style control are in its programs: a second
copy of them here would be another benchmark.
"""

import json
from pathlib import Path

from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca_reference import hub_file
from rmipo.evaluation.benchmark import Benchmark
from rmipo.files import write_atomically
from rmipo.recipe.settings import merge_settings

HUB_DATA, QUESTIONS = "lmarena-ai/arena-hard-auto", "data/arena-hard-v2.0/question.jsonl"
DEFAULTS = {"generation": {}, "questions": None, "first_n": None}  # questions: a file in place of the hub's


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> None:
    """Answer the questions into `output_dir`/arenahard/model_answer/<model>.jsonl. There is no result: see the docs."""
    from rmipo.generation.answers import Generator, Request

    settings = merge_settings("arenahard", DEFAULTS, settings)
    file = Path(settings["questions"] or hub_file(QUESTIONS, HUB_DATA))
    if not file.is_file():
        raise EvaluationError(f"arenahard: questions is {file}: there is no such file")
    questions = [json.loads(line) for line in file.read_text().splitlines()][: settings["first_n"]]
    requests = [Request(q["uid"], [{"role": "user", "content": q["prompt"]}]) for q in questions]
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.answer(requests, generator.file("arenahard", requests))
    name = "-".join(Path(model_dir).resolve().parts[-2:])
    rows = [
        {"uid": request.key, "ans_id": request.key, "model": name, "tstamp": 0, "metadata": {}}
        | {"messages": [*request.messages, {"role": "assistant", "content": {"answer": answer}}]}
        for request, answer in zip(requests, answers, strict=True)
    ]
    path = Path(output_dir) / f"arenahard/model_answer/{name}.jsonl"
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"arenahard: {path}")


BENCHMARK = Benchmark("arenahard", "Arena-Hard v2", run, DEFAULTS, metrics={}, same=())
