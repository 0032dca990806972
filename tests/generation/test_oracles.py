"""Reward models and judges as oracles: right scores whatever the padding, and what a judge's endpoint may do."""

import pytest
import torch
from safetensors.torch import load_file

from rmipo.generation.oracles import OracleError, keep_scores, make_oracle
from rmipo.generation.prompts import Prompt
from tests.helpers.judge_server import JudgeServer
from tests.helpers.rows import user
from tests.helpers.tiny_model import reward_alone, write_reward_model

DIALOGUES = [("w1 w2 w3 w4", "w5"), ("w1", "w6 w7 w8 w9 w10 w11"), ("w2", ""), ("w2", "w3")]
CANDIDATES = [Prompt(str(i), [user(asked)], {str(i): told}) for i, (asked, told) in enumerate(DIALOGUES)]


def oracle_of(folder, **settings):
    return make_oracle({"reward_model": str(folder), "dtype": "float32", **settings})


@pytest.mark.parametrize("pad_token_id", [None, 1, 7], ids=["none", "eos", "another"])
def test_reward_is_that_of_the_last_token_whatever_the_pad_token(tmp_path, pad_token_id):
    folder = write_reward_model(tmp_path, pad_token_id=pad_token_id)
    scores = {}
    for some in oracle_of(folder).score(CANDIDATES):
        scores |= some
    expected = [reward_alone(folder, *each) for each in DIALOGUES]
    assert [scores[str(i)] for i in range(4)] == pytest.approx(expected, abs=1e-5)


def test_reward_depends_on_its_dialogue_alone(tmp_path):
    oracle = oracle_of(write_reward_model(tmp_path, hidden_size=64, intermediate_size=172), dtype="bfloat16")
    words = [" ".join(f"w{1 + (3 * n + i) % 19}" for i in range(n)) for n in range(2, 60, 3)]
    prompts = [Prompt(f"p{n}", [user("w1 w2")], {f"p{n}": text}) for n, text in enumerate(words)]
    together = {key: score for some in oracle.score(prompts) for key, score in some.items()}
    alone = {key: score for prompt in prompts for key, score in next(oracle.score([prompt])).items()}
    assert together == alone


def test_reward_models_that_are_none(tmp_path):
    with pytest.raises(OracleError, match="2 outputs"):
        next(oracle_of(write_reward_model(tmp_path / "two", num_labels=2)).score(CANDIDATES))
    folder = write_reward_model(tmp_path / "one", max_position_embeddings=32)
    long = Prompt("k", [user(" ".join(["w1"] * 40))], {"k": "w1"})
    with pytest.raises(OracleError, match=r"answer k ends at token 4\d, the context at 32"):
        next(oracle_of(folder).score([long]))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError):  # pickles are not loaded
        next(oracle_of(folder).score(CANDIDATES))


PROMPTS = [Prompt(f"p{i}", [user(f"question {i}")], {f"p{i}-{n}": "word " * (n + i) for n in (1, 2)}) for i in range(8)]


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judged(settings) -> scores of a judge on this machine; `asked`: its requests; `malformed`: those answered badly."""
    pytest.importorskip("openai", reason="needs the extra `eval`")
    asked, malformed = [], set()

    def fault(number):
        asked.append(number)
        return "malformed" if number in malformed else None

    def run(**settings):
        oracle = make_oracle({"judge": "test", "concurrency": 2, "price": [0, 0], **settings})
        return keep_scores(tmp_path / "scores.jsonl", oracle.identity, PROMPTS, oracle.score, "scores")

    with JudgeServer(fault=fault) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        run.asked, run.malformed = asked, malformed
        yield run


def test_judge_is_asked_for_what_is_missing_alone(judged, tmp_path):
    judged.malformed.update(range(9, 99))
    with pytest.raises(OracleError, match=r"answer p\d-\d"):
        judged()
    kept = len((tmp_path / "scores.jsonl").read_text().splitlines()) - 1
    assert 7 <= kept <= 9
    judged.asked.clear()
    judged.malformed.clear()
    scores = judged()
    assert len(judged.asked) == 16 - kept and len(scores) == 16
    assert all(1 <= score <= 10 for score in scores.values())


@pytest.mark.parametrize("rating", [0, 11])
def test_ratings_beyond_the_scale_are_none(judged, monkeypatch, rating):
    monkeypatch.setattr("tests.helpers.judge_server.rating", lambda request: rating)
    with pytest.raises(OracleError, match=rf"\[\[{rating}\]\]"):
        judged()
