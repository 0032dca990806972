"""On-policy pairs: every answer stands beside its own prompt, nothing is made twice, and what can't be used is counted."""

import json
import math
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rmipo.errors import CheckpointError, ConfigError, EvaluationError, PairsError
from rmipo.files import LOCK_FILE
from rmipo.fingerprints import json_fingerprint
from rmipo.generation.oracles import OracleError, make_oracle
from rmipo.generation.pairs import PairsConfig, load_pairs_config, make_pairs, select
from rmipo.generation.prompts import Prompt, read_prompts
from tests.helpers.programs import held, run_here
from tests.helpers.rows import assistant, pair, user
from tests.helpers.tiny_model import naive_scores, write_model

GENERATION = {"temperature": 1.0, "max_new_tokens": 6, "batch_size": 4, "dtype": "float32"}
ORACLE = """
def score(messages, answers, bonus=0):
    with open({calls!r}, "a") as file:
        file.write(messages[-1]["content"] + "\\n")
    return [bonus + answer.split().count("w1") + len(answer.split()) / 100 for answer in answers]
"""


class Setup:
    """A random model, prompts, and an oracle that writes down what it is asked, in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        write_model(self.model)
        self.calls = folder / "calls"
        self.oracle(ORACLE.format(calls=str(self.calls)))
        self.prompts([f"w{i % 20} w{(3 * i) % 20} w{i // 20}" for i in range(12)])
        self.config = PairsConfig(
            str(folder / "prompts.jsonl"), {"function": f"{folder}/oracle.py:score"}, answers=4, keep_cut=True
        )

    def oracle(self, text: str) -> None:
        (self.folder / "oracle.py").write_text(text)

    def prompts(self, texts: list, **columns) -> None:
        rows = [text if isinstance(text, dict) else {"prompt": text, **columns} for text in texts]
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(self, output="pairs", **changes) -> dict:
        return make_pairs(self.model, GENERATION, replace(self.config, **changes), self.folder / output)

    def rows(self, *files, output="pairs") -> list[dict]:
        texts = [(self.folder / output / file).read_text() for file in files or ("train.jsonl", "test.jsonl")]
        return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(tmp_path)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_pairs_are_the_best_against_the_worst_answer_of_their_own_prompt(setup):
    result = setup.make()
    pairs, candidates = setup.rows(), setup.rows("candidates.jsonl")
    assert result["pairs"] == len(pairs) > 6 and len(candidates) == 12
    assert len(setup.rows("test.jsonl")) == math.ceil(0.1 * len(pairs))
    by_prompt = {row["prompt"][0]["content"]: row["answers"] for row in candidates}
    for made in pairs:
        assert made["prompt_id"] == json_fingerprint(made["prompt"])
        scores = {a["output"]: a["score"] for a in by_prompt[made["prompt"][0]["content"]] if a["output"]}
        chosen, rejected = made["chosen"][0]["content"], made["rejected"][0]["content"]
        assert made["score_chosen"] == scores[chosen] == max(scores.values())
        assert made["score_rejected"] == scores[rejected] == min(scores.values()) < made["score_chosen"]
        words = chosen.split()
        assert made["score_chosen"] == words.count("w1") + len(words) / 100
    scored = [[a["score"] for a in row["answers"] if a["score"] is not None] for row in candidates]
    best = [max(scores) for scores in scored if scores]
    assert result["best_score"] == pytest.approx(sum(best) / len(best)) != result["mean_score"]
    assert result["mean_score"] == pytest.approx(sum(map(sum, scored)) / sum(map(len, scored)))
    setup.make("other", seed=7)
    assert setup.rows() != setup.rows(output="other")


def test_the_hash_of_its_prompt_decides_whether_a_pair_is_held_out(setup):
    """And not its place: the shortest prompts come first."""
    setup.prompts([f"w{i} " * (1 + i % 4) for i in range(16)])
    setup.make(test_share=0.5)
    ids = sorted(pair["prompt_id"] for pair in setup.rows())
    assert sorted(pair["prompt_id"] for pair in setup.rows("test.jsonl")) == ids[: math.ceil(len(ids) / 2)]


@pytest.mark.parametrize(("answers", "scores"), [(20, 0), (49, 5), (49, 13)])
def test_what_a_kill_left_is_completed_to_the_same_files(setup, answers, scores):
    """So many lines of both files, and half of one more: a header, then 48 answers or the scores of 12 prompts."""
    setup.make("whole")
    whole, folder = setup.folder / "whole", setup.folder / "pairs"
    folder.mkdir()
    for name, count in (("answers.jsonl", answers), ("scores.jsonl", scores)):
        written = (whole / name).read_bytes().splitlines(keepends=True)
        cut = written[count][:20] if count < len(written) else b""
        (folder / name).write_bytes(b"".join(written[:count]) + cut)
    setup.calls.unlink()
    setup.make()
    for file in ("answers.jsonl", "scores.jsonl", "candidates.jsonl", "train.jsonl", "test.jsonl"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()
    asked = setup.calls.read_text().splitlines() if setup.calls.exists() else []
    assert len(asked) == len(set(asked)) == 12 - max(0, scores - 1)  # what has scores is not scored again


def test_a_function_may_ask_for_columns_which_are_missed_before_anything_is_sampled(setup):
    setup.prompts([f"w{i}" for i in range(6)], bonus=10, unused=1)
    setup.make("bonus")
    assert all(pair["score_rejected"] >= 10 for pair in setup.rows(output="bonus"))
    setup.oracle("def score(messages, answers, constraints, bonus=0): return [0] * len(answers)")
    with pytest.raises(PairsError, match=r"prompts.jsonl: rows without constraints"):
        setup.make()
    assert not (setup.folder / "pairs/answers.jsonl").exists()


def test_unusable_prompts_are_counted_with_their_reasons(setup):
    good = [f"w{i} w2" for i in range(5)]
    message = [user("w3")]
    setup.prompts([*good, good[0], "", " ".join(["w1"] * 200)])
    result = setup.make("texts")
    assert result["prompts"] == 5
    reasons = ("repeats an earlier prompt", "the prompt has an empty message", "longer than 127 tokens")
    assert result["dropped"].items() >= dict.fromkeys(reasons, 1).items()
    setup.prompts([{"messages": m} for m in ([*message, assistant("w9")], message * 2)])
    result = setup.make("messages", answers=16)
    assert setup.rows(output="messages")[0]["prompt"] == message
    assert "roles out of order" in " ".join(result["dropped"])


def test_prompts_are_read_within_the_window_after_those_skipped_with_their_system(setup):
    setup.prompts(["w1", "w1 " * 124, "w1 " * 125])  # with BOS and two roles 127 and 128 tokens, the window's size
    assert len(read_prompts(setup.config.prompts, "train", setup.model, Counter())) == 2
    setup.prompts(["w1", "w2", "w2", "", "w3", "w4 w4", "w5", "w6"])  # neither a repeat nor an empty one counts
    dropped = Counter()
    taken = read_prompts(setup.config.prompts, "train", setup.model, dropped, skip=2, limit=3)
    assert {prompt.messages[0]["content"] for prompt in taken} == {"w3", "w4 w4", "w5"}
    assert dropped.total() == 2
    pirate = {"role": "system", "content": "w7 w8"}
    system, dropped = {"system": pirate["content"]}, Counter()
    messages = [user("w3"), assistant("w5")]
    setup.prompts([{"prompt": "w1 w2", **system}, {"messages": messages, **system}])
    prompts = read_prompts(setup.config.prompts, "train", setup.model, dropped)
    assert {prompt.messages[1]["content"] for prompt in prompts} == {"w1 w2", "w3"}
    assert all(prompt.messages[0] == pirate for prompt in prompts)


def test_prompts_of_a_preference_set(setup):
    setup.prompts([pair(i, [user(f"w{i}")]) for i in range(6)])
    setup.make()
    assert {row["prompt"][0]["content"] for row in setup.rows("candidates.jsonl")} == {f"w{i}" for i in range(6)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", r"prompt [0-9a-f]{16}: ZeroDivisionError"),
        ("return [float('nan')] * len(answers)", "nan"),
        ("return [1.0]", "ValueError"),
    ],
)
def test_an_oracle_that_is_wrong_stops_the_run_and_keeps_what_there_is(setup, body, message):
    path, kept = setup.folder / "pairs/scores.jsonl", []
    fault = f"    if os.path.getsize({str(path)!r}) > 700:\n        {body}\n    return list(range(len(answers)))\n"
    setup.oracle(f"import os\ndef score(messages, answers):\n{fault}")
    for _ in range(2):
        with pytest.raises(OracleError, match=message):
            setup.make()
        kept.append(path.read_bytes())
    assert kept[0] == kept[1] and lines(path) > 2


def test_settings_that_are_wrong_are_named(setup, tmp_path):
    (tmp_path / "pairs.yaml").write_text("prompts: x\nanswer: 3\n")
    with pytest.raises(ConfigError, match=r"pairs\.yaml: oracle(?s:.*)answer is 3"):
        load_pairs_config(tmp_path / "pairs.yaml", [])
    config = load_pairs_config(tmp_path / "none.yaml", ["--oracle.judge", "gpt", "--answers=3"], "mine.jsonl")
    assert (config.prompts, config.oracle, config.answers) == ("mine.jsonl", {"judge": "gpt"}, 3)
    with pytest.raises(OracleError, match="exactly one"):
        make_oracle({"judge": "a", "reward_model": "b"})


ANSWERS = Prompt("k", [user("q")], {f"k-{i}": f"answer {i}" for i in range(4)})


@pytest.mark.parametrize(
    ("selection", "scores", "pmi", "gap", "expected"),
    [
        ("best-worst", [1], [], 0.0, "fewer than two answers differ and are neither empty nor cut"),
        ("best-worst", [1, 3, 0, 3], [], 0.0, ("k-1", "k-2")),
        ("best-worst", [1, 1, 1, 1], [], 0.0, "all answers have the same score"),
        ("best-random", [1, 3, 3, 3], [], 0.0, ("k-1", "k-0")),
        ("best-random", [2, 3, 0, 3], [], 2.0, ("k-1", "k-2")),
        ("pmi", [0, 1, 0, 1], [0.5, 0.2, 0.1, 0.9], 0.0, ("k-3", "k-2")),
        ("pmi", [1, 1, 1, 1], [0.5, 0.2, 0.1, 0.9], 0.0, ("k-3", "k-2")),
        ("pmi", [1, 1, 1, 1], [0.5, 0.2, 0.1, 0.9], 0.1, "the scores differ by less than 0.1"),
    ],
)
def test_selection(selection, scores, pmi, gap, expected):
    config = PairsConfig("p", {"judge": "j"}, selection=selection, min_gap=gap)
    named = [{f"k-{i}": float(value) for i, value in enumerate(values)} for values in (scores, pmi)]
    prompt = replace(ANSWERS, answers={key: ANSWERS.answers[key] for key in named[0]})
    assert select(prompt, *named, config) == expected


def test_cut_answers_are_counted_and_not_used(setup):
    both = setup.make(answers=16)
    whole = setup.make("whole", answers=16, keep_cut=False)
    rows = [answer for row in setup.rows("candidates.jsonl", output="whole") for answer in row["answers"]]
    cut = [row["output"] for row in rows if row["finish"] == "length"]
    assert both["cut"] == whole["cut"] == len(cut) and both["answers"] == len(rows) == 12 * 16
    used = {row[side][0]["content"] for row in setup.rows(output="whole") for side in ("chosen", "rejected")}
    assert used and used <= {row["output"] for row in rows if row["finish"] == "stop"}
    assert all(row["score"] is None for row in rows if row["finish"] == "length" and row["output"] not in used)
    with pytest.raises(PairsError, match=r"4\d of 48 answers are cut"):
        setup.make("none", keep_cut=False, generation={"max_new_tokens": 1, "seed": 1})


def test_pmi_is_that_of_one_sequence_at_a_time(setup):
    setup.make(selection="pmi")
    pair = next(row for row in setup.rows() if row["score_chosen"] > row["score_rejected"])
    sides = {side: pair[side][0]["content"] for side in ("chosen", "rejected")}
    naive = naive_scores(setup.model, [{"prompt": pair["prompt"][0]["content"], **sides}])
    answers = {a["output"]: a["pmi"] for row in setup.rows("candidates.jsonl") for a in row["answers"]}
    for side, text in sides.items():
        expected = (naive[f"{side}_logps"] - naive[f"prior_{side}_logps"]) / naive[f"{side}_lengths"]
        torch.testing.assert_close(answers[text], expected.item(), rtol=0, atol=1e-5)


def test_two_programs_or_oracles_make_no_pairs_in_one_folder(setup, tmp_path):
    with held(tmp_path / "pairs"), pytest.raises(CheckpointError, match=r"OUTPUT: another run is active in .*/pairs"):
        setup.make()
    assert setup.make()["pairs"] > 0 and not (tmp_path / "pairs" / LOCK_FILE).exists()
    setup.oracle("def score(messages, answers): return list(range(len(answers)))")
    with pytest.raises(EvaluationError, match=r"scores\.jsonl"):
        setup.make()
    with pytest.raises(EvaluationError, match=r"answers\.jsonl"):
        setup.make(seed=3)


def test_what_the_setting_and_the_user_say_reaches_the_pairs(monkeypatch):
    made, targets = [], []

    def find(*given):
        targets.append(given)
        return types.SimpleNamespace(folder=Path("policy"), settings={"generation": GENERATION})

    result = {"pairs": 1, "prompts": 2, "cut": 0, "answers": 6, "dropped": {}, "mean_score": 0.0, "best_score": 1.0}
    monkeypatch.setattr("rmipo.evaluation.target.find_target", find)
    monkeypatch.setattr("rmipo.launch.pipeline.make_weights", lambda model: None)
    monkeypatch.setattr("rmipo.generation.pairs.make_pairs", lambda *given: made.append(given) or result)
    given = ["--model", "tiny", "--method", "sft", "--prompts", "mine.jsonl", "--answers", "3", "--oracle.judge", "gpt"]
    assert run_here("pairs", *given).code == run_here("pairs", *given, "--method", "", "--output", "there").code == 0
    config = PairsConfig("mine.jsonl", {"judge": "gpt"}, answers=3)
    folders = [Path("outputs/tiny/pairs-sft"), Path("there")]
    assert made == [(Path("policy"), GENERATION, config, folder) for folder in folders]
    assert targets == [("tiny", method, Path("outputs"), []) for method in ("sft", "initial")]
