"""What AlpacaEval is given: prompts, reference outputs, settings, and what it makes of verdicts; without its package."""

import gzip
import json
import os
import re
import sys

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import alpaca, leaderboard, mtbench
from rmipo.evaluation.alpaca_reference import load_reference
from tests.helpers.rows import assistant, user, write

ROWS = [{"instruction": f"tell me {i} things", "output": f"thing {i}"} for i in range(20)]


def test_preference_pairs_as_reference(tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("c", "4")]
    write(file, [{"prompt": [user(q)], "chosen": [assistant(c)]} for q, c in pairs])
    zipped = tmp_path / "pairs.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    for path in (file, zipped):
        rows, _ = load_reference(str(path))
        assert [(row["instruction"], row["output"]) for row in rows] == [("b", "1"), ("a", "2"), ("c", "4")]
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps([*ROWS, ROWS[3]]))
    with pytest.raises(EvaluationError, match=r"twice\.json"):  # alpaca-eval would pair them crosswise
        load_reference(str(twice))


@pytest.mark.parametrize(
    ("environment", "settings", "named"),
    [
        ({}, {}, "OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "none", "OPENAI_API_BASE": "http://h/v1"}, {}, "OPENAI_API_BASE"),
        ({"OPENAI_API_KEY": "none"}, {"judge": "gpt-4"}, "judge"),
        ({"OPENAI_API_KEY": "none"}, {"reference": "absent.json"}, "absent.json"),
        ({"OPENAI_API_KEY": "none"}, {"reference": __file__}, "alpacaeval.reference"),
        ({"OPENAI_API_KEY": "none"}, {"generation": {"top_p": 2}}, "top_p is 2"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, environment, settings, named):
    for name in [name for name in os.environ if name.startswith("OPENAI")]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EvaluationError, match=re.escape(named)):
        alpaca.run(tmp_path / "no model", tmp_path, {"length_controlled": False, **settings})


def test_missing_package_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "reference.json").write_text(json.dumps(ROWS))
    settings = {"reference": str(tmp_path / "reference.json"), "length_controlled": False}
    for bench, module, given in (
        (alpaca, "alpaca_eval", settings), (mtbench, "mtbench_evaluator", {}), (leaderboard, "lm_eval", {}),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)  # as if it weren't installed
        with pytest.raises(EvaluationError, match=f"{module} isn't installed: make install EXTRAS=eval$"):
            bench.run(tmp_path / "no model", tmp_path, given)


def test_unusable_verdicts_are_dropped_and_an_empty_file_with_them(tmp_path):
    cache = tmp_path / "verdicts.json"
    assert alpaca.keep_usable(cache) == [] and not cache.exists()
    preferences = [-1, 1.0, None, 1.25, 2.0, 0.0, 2.5]
    cache.write_text(json.dumps([{"preference": preference} for preference in preferences]))
    assert [row["preference"] for row in alpaca.keep_usable(cache)] == [1.0, 1.25, 2.0]
    assert [row["preference"] for row in json.loads(cache.read_text())] == [1.0, 1.25, 2.0]
    cache.write_text(json.dumps([{"preference": -1}]))
    assert alpaca.keep_usable(cache) == [] and not cache.exists()
