"""`make doctor EVAL=1`: what is missing is named with its fix, and a judge is asked, on loopback."""

import sys

import pytest

from rmipo.evaluation import doctor, leaderboard
from tests.helpers.judge_server import JudgeServer

SETTINGS = {
    "alpacaeval": {"reference": "mine.jsonl"},
    "leaderboard": {"include_path": "recipes/tiny/leaderboard"},
    "hh": {"helpful": {"dataset_name": "outputs/tiny/world/pairs"}},
}


def found(settings: dict) -> dict:
    return {check.name: check for check in doctor.checks(settings)}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")


def test_a_judge_with_and_without_log_probs(monkeypatch):
    pytest.importorskip("alpaca_eval")
    with JudgeServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        checks = found(SETTINGS)
        assert all(check.passed is not False for check in checks.values())
        assert checks["judge"].found.startswith("gpt-4-1106-preview at 127.0.0.1") and len(server.requests) == 1
        assert set(checks) == {"alpaca_eval", "mtbench_evaluator", "lm_eval", "answers", "judge"}
        server.fault = lambda number: "no_logprobs"
        assert "returns no log-probs" in found(SETTINGS)["judge"].found
    judge = found(SETTINGS)["judge"]  # the server is gone
    assert judge.passed is False and "APIConnectionError" in judge.found
    assert "sk-secret" not in judge.found


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    pytest.importorskip("nltk", reason="needs the extra `eval`")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.delenv("OPENAI_API_KEY")
    checks = found({})
    missing = {name for name, check in checks.items() if check.passed is False}
    assert missing == {"lm_eval", "AlpacaEval", *leaderboard.DEFAULTS["tasks"], "HH", "judge"}
    assert not checks["HH"].passed and "Anthropic/hh-rlhf" in checks["HH"].found
    assert "TAUR-Lab/MuSR" in checks["musr"].found
    assert "make install EXTRAS=eval" in checks["lm_eval"].found and "hf download" in checks["AlpacaEval"].found
    assert "nltk.downloader punkt_tab" in checks["ifeval"].found and "OPENAI_API_KEY" in checks["judge"].found
