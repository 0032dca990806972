"""AlpacaEval against hand-computed rates, the packaged leaderboard, and a real judge server on loopback that fails."""

import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import alpaca
from rmipo.evaluation.alpaca import REFERENCE_FILE
from rmipo.fingerprints import trained_fingerprint
from rmipo.generation.answers import check_settings
from rmipo.record import package_versions
from tests.helpers.judge_server import JudgeServer, probability_of_first
from tests.helpers.paths import ROOT
from tests.helpers.rows import write
from tests.helpers.tiny_model import other_versions, write_model

SETTINGS = alpaca.DEFAULTS | {"length_controlled": False, "concurrency": 4}
ROWS = 20
REFERENCE = [
    {"instruction": f"tell me {i} things of apple", "output": f"apple {i}" + " me" * (i % 3), "generator": "reference"}
    for i in range(ROWS)
]
OUTPUTS = [
    {"instruction": row["instruction"], "output": "tell " * (i % 2) + f"things {i} " * (i % 4), "generator": "ours"}
    for i, row in enumerate(REFERENCE)
]
alpaca_eval = pytest.importorskip("alpaca_eval", reason="needs the extra `eval`")
openai = pytest.importorskip("openai")


def expected_win_rate(rows) -> float:
    """Percent: the mean of the server's probability for our output, whatever the order it saw the two in."""
    texts = [(REFERENCE[i]["instruction"], OUTPUTS[i]["output"], REFERENCE[i]["output"]) for i in rows]
    return 100 * statistics.mean(probability_of_first(*each) for each in texts)


def ask(server: JudgeServer, folder: Path, monkeypatch, **settings) -> dict:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setattr(alpaca, "CLIENT", {"max_retries": 1, "timeout": 10})
    return alpaca.judge(OUTPUTS, REFERENCE, folder, server.url, SETTINGS | settings)[0]


def verdicts(folder: Path) -> list[dict]:
    (file,) = folder.glob("verdicts-*.json")
    return json.loads(file.read_text())


def test_weighted_judge_gives_the_mean_probability(tmp_path, monkeypatch, api_key):
    with JudgeServer() as server:
        metrics = ask(server, tmp_path, monkeypatch)
        assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
        assert metrics["alpacaeval2_length"] == sum(len(row["output"]) for row in OUTPUTS) / ROWS
        assert metrics["alpacaeval2_missing"] == 0 and "alpacaeval2_lc" not in metrics
        assert len(server.requests) == len(set(server.requests)) == ROWS
        _, by_prompts, sha256 = alpaca.judge(OUTPUTS, REFERENCE, tmp_path, server.url, SETTINGS)
        assert sha256 == alpaca.PAPERS_JUDGE
        wins = by_prompts["per_prompt"]["alpacaeval2_wr"]
        assert wins == pytest.approx([expected_win_rate([i]) for i in range(ROWS)], abs=1e-6)
        assert "draws" not in by_prompts
        again = ask(server, tmp_path, monkeypatch)  # everything is known
        assert again == pytest.approx(metrics, abs=1e-8)  # JSON rounds verdicts to 1e-10
        assert len(server.requests) == ROWS


def test_another_endpoint_or_judge_file_is_another_judge(tmp_path, monkeypatch, api_key):
    judge = tmp_path / "judges/mine/configs.yaml"
    judge.parent.mkdir(parents=True)
    text = (ROOT / "configs/judges/llama3-70b-vllm/configs.yaml").read_text()
    with JudgeServer() as server, JudgeServer() as other:
        for asked, ending in ((1, ""), (2, "# another\n"), (2, "# another\n")):
            judge.write_text(text + ending)
            ask(server, tmp_path / "verdicts", monkeypatch, annotators_config=str(judge.parent))
            assert len(server.requests) == asked * ROWS
        ask(other, tmp_path / "verdicts", monkeypatch, annotators_config=str(judge.parent))
        asked = sorted(other.requests)
        other.requests.clear()
        ask(other, tmp_path / "packaged", monkeypatch)
        # The judge that configs/ ships asks what the packaged one asks.
        assert len(asked) == ROWS and sorted(other.requests) == asked


def test_unusable_verdicts_are_reported_counted_and_asked_again(tmp_path, monkeypatch, api_key):
    broken = {3, 11, 12}
    with JudgeServer(fault=lambda number: "malformed" if number in broken else None) as server:
        with pytest.raises(EvaluationError, match="3 of 20 verdicts"):
            ask(server, tmp_path, monkeypatch)
        assert len(server.requests) == ROWS
        broken.add(ROWS)  # the first that is asked again
        metrics = ask(server, tmp_path, monkeypatch, max_missing=1)
        assert metrics["alpacaeval2_missing"] == 1
        known = {row["instruction"] for row in verdicts(tmp_path) if row["preference"] > 0}
        rows = [i for i, row in enumerate(REFERENCE) if row["instruction"] in known]
        assert len(rows) == ROWS - 1 and metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(rows), abs=1e-6)
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) == ROWS + 3 + 1
    assert metrics["alpacaeval2_missing"] == 0
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert Counter(row["instruction"] for row in verdicts(tmp_path)) == Counter(row["instruction"] for row in REFERENCE)


def test_judge_without_any_usable_verdict_is_found_out_early(tmp_path, monkeypatch, api_key):
    with JudgeServer(fault=lambda number: "no_logprobs") as server:
        for asked in (1, 2):  # the second time from the file that the first one left
            with pytest.raises(EvaluationError, match="first 4 answers"):
                ask(server, tmp_path, monkeypatch)
            assert len(server.requests) == asked * SETTINGS["concurrency"]


def test_server_that_fails_leaves_the_verdicts_so_far(tmp_path, monkeypatch, api_key):
    with JudgeServer(fault=lambda number: "drop" if number >= 10 else None) as server:
        with pytest.raises(openai.APIConnectionError):
            ask(server, tmp_path, monkeypatch)
        kept = verdicts(tmp_path)
        assert len(kept) == 8  # two whole rounds of 4
        server.fault = lambda number: None
        asked_before = len(server.requests)
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) - asked_before == ROWS - 8
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert [row for row in verdicts(tmp_path) if row in kept] == kept


def test_cost_is_printed_and_bounded_before_the_first_request(tmp_path, monkeypatch, api_key, capsys):
    with JudgeServer() as server:
        with pytest.raises(EvaluationError, match=r"max_cost 0\.001"):
            ask(server, tmp_path, monkeypatch, max_cost=0.001)
        assert server.requests == []
        texts = [row["output"] for row in (*REFERENCE, *OUTPUTS)] + [row["instruction"] for row in REFERENCE]
        judge = len(alpaca.read_judge(SETTINGS["annotators_config"])[2])
        cost = (10 * (ROWS * judge + len("".join(texts))) / 4 + 30 * ROWS) / 1e6  # a verdict is one token
        assert f"${cost:.2f}" in capsys.readouterr().out


def test_answers_of_a_gpu_node_are_judged_where_there_is_a_network(tmp_path, monkeypatch, api_key):
    model = tmp_path / "model"
    write_model(model)
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps(REFERENCE))
    generation = {"dtype": "float32", "max_new_tokens": 8}
    settings = {"reference": str(reference), "length_controlled": False, "generation": generation}
    assert alpaca.BENCHMARK.run(model, tmp_path / "eval", settings | {"generate_only": True}) is None
    (path,) = (model / "eval/answers").iterdir()
    versions = other_versions(path, "vllm")  # as if that had been where vLLM is
    answers, weights = path.read_bytes(), trained_fingerprint(model)
    (model / "model.safetensors").unlink()  # a machine that only judges needs no weights
    with JudgeServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("http://", "http://user:secret@"))
        result = alpaca.BENCHMARK.run(model, tmp_path / "eval", settings)
    assert path.read_bytes() == answers and result["fingerprint"] == weights
    finishes = [json.loads(line)["finish"] for line in answers.splitlines()[1:]]
    assert result["metrics"]["alpacaeval2_cut"] == 100 * finishes.count("length") / ROWS > 0
    assert result["versions"] == versions | package_versions("alpaca_eval", "scikit-learn")
    recorded = result["settings"]
    assert recorded["generation"] == check_settings(generation | {"engine": "vllm"})
    assert recorded["judge_endpoint"] == server.url.removeprefix("http://")
    assert recorded["reference_sha256"] == hashlib.sha256(reference.read_bytes()).hexdigest()[:16]
    assert len(recorded["judge_sha256"]) == 16 and "secret" not in json.dumps(result)


RUN = """
import json, sys
from rmipo.errors import EvaluationError
from rmipo.evaluation import alpaca
alpaca.DRAWS = 12
results = []
for settings in json.loads(sys.argv[3]):
    try:
        results.append(alpaca.BENCHMARK.run(sys.argv[1], sys.argv[2], settings))
    except EvaluationError as error:
        results.append(str(error))
# What alpaca_eval itself makes of the verdicts, and of twelve draws of the prompts.
import numpy
from pathlib import Path
from alpaca_eval.metrics import get_length_controlled_winrate
(path,) = Path(sys.argv[2], "alpacaeval").glob("verdicts-*.json")
known = {row["instruction"]: row for row in json.loads(path.read_text())}
generators = {"generator_1": "reference", "generator_2": "model"}  # the verdict file is for any two
rows = [known[instruction] | generators for instruction in json.loads(sys.argv[4])]
numbers = numpy.random.default_rng(0)
draws = [range(40)] + [numbers.integers(0, 40, 40) for _ in range(12)]
rates = [get_length_controlled_winrate([rows[i] | {"index": i} for i in draw], save_weights_dir=None) for draw in draws]
print("RESULT" + json.dumps([results, [float(rate["length_controlled_winrate"]) for rate in rates]]))
"""


def test_run_with_length_control_on_made_up_regularisation(tmp_path):
    """The length-controlled path from end to end. df_gamed.csv is made up here: its number says nothing."""
    model = tmp_path / "model"
    write_model(model)
    # The hub's cache, with a made-up benchmark in it.
    rows = [{"instruction": f"w{i % 20} w{i // 3}", "output": "w1 " * (1 + i % 7)} for i in range(40)]
    snapshot = tmp_path / "hub/datasets--tatsu-lab--alpaca_eval/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / REFERENCE_FILE).write_text(json.dumps(rows))
    write(snapshot.parents[1] / "refs/main", []).write_text("0")
    gamed = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for m, i in itertools.product((0, 1), range(40)):
        gamed.append(f"{m},{i},{0.2 + 0.6 * (i % 3) / 2},{(-1) ** m * 1.5},{(i % 5) / 5 - 0.4},False")
    (snapshot / "df_gamed.csv").write_text("\n".join(gamed) + "\n")
    generation = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 8, "temperature": 1.0}

    trials = [{"generation": generation, "first_n": 39}, {"generation": generation}]
    instructions = json.dumps([row["instruction"] for row in rows])
    command = [sys.executable, "-c", RUN, str(model), str(tmp_path / "eval"), json.dumps(trials), instructions]
    with JudgeServer() as server:
        environment = {
            **os.environ, "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": server.url,
            "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (refused, result), (expected, *draws) = json.loads(done.stdout.partition("RESULT")[2])
    # Rows that the length-controlled model wasn't made for.
    assert "length_controlled" in refused and len(server.requests) == 41  # and one before anything is loaded
    outputs = json.loads((tmp_path / "eval/alpacaeval/model_outputs.json").read_text())
    wins = [
        probability_of_first(row["instruction"], ours["output"], row["output"])
        for row, ours in zip(rows, outputs, strict=True)
    ]
    metrics = result["metrics"]
    assert metrics["alpacaeval2_wr"] == pytest.approx(100 * sum(wins) / 40, abs=1e-6)
    assert metrics["alpacaeval2_lc"] == pytest.approx(expected, abs=1e-6)
    assert result["draws"]["alpacaeval2_lc"] == pytest.approx(draws, abs=1e-6)
    assert metrics["alpacaeval2_lc_standard_error"] == pytest.approx(statistics.stdev(draws), abs=1e-6)
    assert abs(metrics["alpacaeval2_lc"] - metrics["alpacaeval2_wr"]) > 0.1  # it is another number
    assert result["versions"]["alpaca_eval"] == "0.6.6" and set(result["versions"]) >= {"scikit-learn", "transformers"}
