"""AlpacaEval against hand-computed rates, the packaged leaderboard, and a real judge server on loopback that fails."""

import csv
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rmipo.errors import EvaluationError
from rmipo.evaluation import alpaca
from rmipo.evaluation.alpaca_reference import GAMED_FILE, REFERENCE_FILE
from rmipo.fingerprints import trained_fingerprint
from rmipo.generation.answers import check_settings
from rmipo.record import package_versions
from tests.helpers.alpaca_answers import OUTPUTS, REFERENCE, ROWS, SETTINGS
from tests.helpers.answer_files import other_versions
from tests.helpers.judge_server import JudgeServer, probability_of_first
from tests.helpers.launched import launch, wait_until
from tests.helpers.paths import ROOT
from tests.helpers.tiny_model import write_model

alpaca_eval = pytest.importorskip("alpaca_eval", reason="needs the extra `eval`")
from alpaca_eval.metrics import get_winrate  # noqa: E402


def expected_win_rate(rows) -> float:
    """Percent: the mean of the server's probability for our output, whatever the order it saw the two in."""
    wins = [
        probability_of_first(REFERENCE[i]["instruction"], OUTPUTS[i]["output"], REFERENCE[i]["output"]) for i in rows
    ]
    return 100 * sum(wins) / len(wins)


def leaderboard() -> list[dict[str, str]]:
    """The rows that the package ships, one for each model."""
    folder = Path(alpaca_eval.__file__).parent / "leaderboards/data_AlpacaEval_2"
    with (folder / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["discrete_win_rate"]]
    assert len(rows) > 200
    return rows


def ask(server: JudgeServer, folder: Path, monkeypatch, **settings) -> dict:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    return alpaca.judge(OUTPUTS, REFERENCE, folder, server.url, SETTINGS | settings)[0]


def verdicts(folder: Path) -> list[dict]:
    (file,) = folder.glob("verdicts-*.json")
    return json.loads(file.read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_raw_win_rate_by_hand():
    # 2 wins, 1 loses, 0 and 1.5 are draws, 1.25 is a quarter of a win: (1 + 0 + .5 + .5 + .25) / 5; None isn't counted.
    rates = get_winrate([{"preference": p} for p in (2, 1, 0, 1.5, 1.25, None)])
    assert rates["win_rate"] == pytest.approx(45.0, abs=1e-9) and rates["n_total"] == 5


def test_packaged_leaderboard_is_reproduced_from_its_counts():
    """From published wins, losses and draws to the published discrete rate; raw rates need the annotations (below)."""
    differing = []
    for row in leaderboard():
        counts = {2.0: "n_wins", 1.0: "n_wins_base", 1.5: "n_draws"}
        preferences = [p for p, column in counts.items() for _ in range(int(float(row[column])))]
        rate = get_winrate([{"preference": p} for p in preferences])["discrete_win_rate"]
        if rate != pytest.approx(float(row["discrete_win_rate"]), abs=1e-6):
            differing.append(row[""])
    # One published row contradicts itself: 371 wins and 17 draws of 805 are 47.1%, and it says 40.2%.
    assert differing == ["aligner-2b_gpt-4-turbo-2024-04-09"]


def test_published_annotations_reproduce_the_leaderboard():
    """The folder `results` of the alpaca_eval repository isn't in its package: name it in ALPACA_EVAL_RESULTS."""
    if "ALPACA_EVAL_RESULTS" not in os.environ:
        pytest.skip("ALPACA_EVAL_RESULTS doesn't name the folder `results` of the alpaca_eval repository")
    published = {row[""]: float(row["win_rate"]) for row in leaderboard()}
    files = Path(os.environ["ALPACA_EVAL_RESULTS"]).glob("*/weighted_alpaca_eval_gpt4_turbo/annotations.json")
    found = {file.parent.parent.name: file for file in files if file.parent.parent.name in published}
    assert found
    for name, file in found.items():
        assert get_winrate(json.loads(file.read_text()))["win_rate"] == pytest.approx(published[name], abs=1e-6), name


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
        # Once more: everything is known, nothing is asked.
        assert ask(server, tmp_path, monkeypatch) == pytest.approx(metrics, abs=1e-8)  # JSON rounds verdicts to 1e-10
        assert len(server.requests) == ROWS


def test_another_endpoint_is_another_judge(tmp_path, monkeypatch, api_key):
    with JudgeServer() as first, JudgeServer() as second:
        ask(first, tmp_path, monkeypatch)
        ask(second, tmp_path, monkeypatch)
        assert len(first.requests) == len(second.requests) == ROWS


# ----------------------------------------------------------------------------------------------------------------------
# A judge that fails
# ----------------------------------------------------------------------------------------------------------------------

JUDGE = """
import sys
from pathlib import Path
from rmipo.evaluation import alpaca
from tests.helpers.alpaca_answers import OUTPUTS, REFERENCE, SETTINGS
alpaca.judge(OUTPUTS, REFERENCE, Path(sys.argv[1]), sys.argv[2], SETTINGS)
"""


def test_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, api_key):
    with JudgeServer(delay=0.15) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        process = launch(["-c", JUDGE, str(tmp_path), server.url])
        wait_until(lambda: len(server.answered) >= 10, process)
        process.end()
        time.sleep(0.5)  # requests under way are answered
        kept = verdicts(tmp_path)
        assert 4 <= len(kept) < ROWS
        asked_before = len(server.requests)
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) - asked_before == ROWS - len(kept)  # only the others are asked for
        # No more is asked for twice than was under way together.
        assert len(server.requests) <= ROWS + SETTINGS["concurrency"]
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert Counter(row["instruction"] for row in verdicts(tmp_path)) == Counter(row["instruction"] for row in REFERENCE)


def test_rate_limit_is_waited_out(tmp_path, monkeypatch, api_key):
    with JudgeServer(fault=lambda number: "429" if number in (2, 7, 8) else None) as server:
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) == ROWS + 3 and len(server.answered) == ROWS
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)


@pytest.mark.parametrize("fault", ["malformed", "no_logprobs"])
def test_unusable_verdicts_are_reported_and_asked_again(tmp_path, monkeypatch, api_key, fault):
    broken = {3, 11, 12}
    with JudgeServer(fault=lambda number: fault if number in broken else None) as server:
        with pytest.raises(EvaluationError, match=r"3 of 20 verdicts couldn't be used, max_missing is 0.*asks again"):
            ask(server, tmp_path, monkeypatch)
        assert len(server.requests) == ROWS
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) == ROWS + 3
    assert metrics["alpacaeval2_missing"] == 0
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert Counter(row["instruction"] for row in verdicts(tmp_path)) == Counter(row["instruction"] for row in REFERENCE)


def test_allowed_missing_verdicts_are_counted(tmp_path, monkeypatch, api_key):
    with JudgeServer(fault=lambda number: "malformed" if number == 15 else None) as server:
        metrics = ask(server, tmp_path, monkeypatch, max_missing=1, concurrency=1)
    assert metrics["alpacaeval2_missing"] == 1
    known = {row["instruction"] for row in verdicts(tmp_path) if row["preference"] > 0}
    rows = [i for i, row in enumerate(REFERENCE) if row["instruction"] in known]
    assert len(rows) == ROWS - 1
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(rows), abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "answer"),
    [("malformed", r"'I would rather not say\.', with log-probs$"), ("no_logprobs", "'[mM]', without log-probs$")],
)
def test_judge_without_any_usable_verdict_is_found_out_early(tmp_path, monkeypatch, api_key, fault, answer):
    with JudgeServer(fault=lambda number: fault) as server:
        for asked in (1, 2):  # the second time from the file that the first one left
            with pytest.raises(
                EvaluationError, match=f"none of the judge's first 4 answers could be read .*last answer: {answer}"
            ):
                ask(server, tmp_path, monkeypatch)
            assert len(server.requests) == asked * SETTINGS["concurrency"]
            assert all(row["preference"] == -1 for row in verdicts(tmp_path))
        server.fault = lambda number: None  # a healthy judge at the same place
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) == 2 * SETTINGS["concurrency"] + ROWS
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert Counter(row["instruction"] for row in verdicts(tmp_path)) == Counter(row["instruction"] for row in REFERENCE)


def test_another_prompt_file_is_another_judge(tmp_path, monkeypatch, api_key):
    packaged = Path(alpaca_eval.__file__).parent / "evaluators_configs"
    judge, prompt = tmp_path / "judges/mine/configs.yaml", tmp_path / "judges/mine/prompt.txt"
    judge.parent.mkdir(parents=True)
    text = (packaged / "weighted_alpaca_eval_gpt4_turbo/configs.yaml").read_text()
    judge.write_text(text.replace("alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt", "mine/prompt.txt"))
    with JudgeServer() as server:
        for asked, ending in ((1, ""), (2, "\n"), (2, "\n")):
            prompt.write_text((packaged / "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt").read_text() + ending)
            ask(server, tmp_path / "verdicts", monkeypatch, annotators_config=str(judge.parent))
            assert len(server.requests) == asked * ROWS
        # The same judge in another place, as in the clone of another machine, has given its verdicts.
        (tmp_path / "judges").rename(tmp_path / "moved")
        ask(server, tmp_path / "verdicts", monkeypatch, annotators_config=str(tmp_path / "moved/mine"))
        assert len(server.requests) == 2 * ROWS


@pytest.mark.parametrize("fault", ["drop", "html"])
def test_server_that_dies_leaves_the_verdicts_so_far(tmp_path, monkeypatch, api_key, fault):
    with JudgeServer(fault=lambda number: None if number < 10 else fault) as server:
        with pytest.raises(
            EvaluationError, match=r"judge at 127\.0\.0\.1:.* failed: .* 8 of 20 verdicts are kept in .*same command"
        ):
            ask(server, tmp_path, monkeypatch)
        kept = verdicts(tmp_path)
        assert len(kept) == 8  # two whole rounds of 4
        server.fault = lambda number: None
        asked_before = len(server.requests)
        metrics = ask(server, tmp_path, monkeypatch)
        assert len(server.requests) - asked_before == ROWS - 8
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert [row for row in verdicts(tmp_path) if row in kept] == kept


MORTAL = """
import sys
from tests.helpers.judge_server import JudgeServer
deadly = int(sys.argv[2])
def fault(number):
    print("asked", flush=True)
    return "die" if number == deadly else None
JudgeServer(int(sys.argv[1]), fault=fault).serve_forever()
"""


def test_judge_process_that_dies_and_is_started_again(tmp_path, monkeypatch, api_key):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    settings = SETTINGS | {"max_retries": 0}

    def judge_process(deadly: int) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", MORTAL, str(port), str(deadly)], stdout=subprocess.PIPE)
        deadline = time.time() + 250
        while time.time() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        return process

    mortal = judge_process(deadly=9)
    with pytest.raises(EvaluationError, match=r"failed: APIConnectionError.* 8 of 20 verdicts are kept"):
        alpaca.judge(OUTPUTS, REFERENCE, tmp_path, url, settings)
    assert mortal.wait(10) == 1
    kept = verdicts(tmp_path)
    again = judge_process(deadly=-1)
    metrics, *_ = alpaca.judge(OUTPUTS, REFERENCE, tmp_path, url, settings)
    again.kill()
    assert again.communicate()[0].count(b"asked") == ROWS - 8
    assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
    assert [row for row in verdicts(tmp_path) if row in kept] == kept and len(kept) == 8
    assert Counter(row["instruction"] for row in verdicts(tmp_path)) == Counter(row["instruction"] for row in REFERENCE)


def test_no_server_at_all(tmp_path, monkeypatch, api_key, caplog):
    with JudgeServer() as server:
        pass
    with pytest.raises(EvaluationError, match=r"failed: APIConnectionError.*[^.]\. 0 of 20 verdicts"):
        ask(server, tmp_path, monkeypatch)
    assert "OpenAIError" in caplog.text and "Traceback" not in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# Before the first request
# ----------------------------------------------------------------------------------------------------------------------


def test_cost_is_printed_and_bounded_before_the_first_request(tmp_path, monkeypatch, api_key, capsys):
    with JudgeServer() as server:
        with pytest.raises(EvaluationError, match=r"about \$\d+\.\d\d, more than max_cost 0\.001; nothing was asked"):
            ask(server, tmp_path, monkeypatch, max_cost=0.001)
        assert server.requests == []
        printed = capsys.readouterr().out
        template = (
            Path(alpaca_eval.__file__).parent / "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
        )
        texts = [text for row in (*REFERENCE, *OUTPUTS) for text in row["output"]] + [
            r["instruction"] for r in REFERENCE
        ]
        tokens = (ROWS * len(template.read_text()) + len("".join(texts))) / 4
        cost = (10 * tokens + 30 * ROWS) / 1e6  # a verdict is one token
        assert f"20 verdicts to ask for, about {tokens / 1e3:.0f}k + 0k tokens, ${cost:.2f} at" in printed
        ask(server, tmp_path, monkeypatch)
        capsys.readouterr()
        ask(server, tmp_path, monkeypatch, max_cost=0.0)  # what is known costs nothing
        assert "0 verdicts to ask for" in capsys.readouterr().out


def test_unknown_judge(tmp_path, api_key):
    with pytest.raises(EvaluationError, match="'gpt-5' is neither one of alpaca-eval's judges nor a folder"):
        alpaca.judge(OUTPUTS, REFERENCE, tmp_path, "http://x/v1", SETTINGS | {"annotators_config": "gpt-5"})


def test_judge_with_a_packaged_prompt_of_our_own(tmp_path, monkeypatch, api_key, caplog):
    """The judge that configs/ ships asks what the packaged one asks, and a prompt file that isn't there is refused."""
    monkeypatch.chdir(ROOT)
    with JudgeServer() as server:
        ask(server, tmp_path / "packaged", monkeypatch)
        packaged = sorted(server.requests)
        server.requests.clear()
        metrics = ask(server, tmp_path / "open", monkeypatch, annotators_config="configs/judges/llama3-70b-vllm")
        assert metrics["alpacaeval2_wr"] == pytest.approx(expected_win_rate(range(ROWS)), abs=1e-6)
        assert len(packaged) == ROWS and sorted(server.requests) == packaged
        assert "price per token" not in caplog.text  # which alpaca-eval doesn't know, and says with every request
        judge = tmp_path / "mine/configs.yaml"
        judge.parent.mkdir()
        text = (ROOT / "configs/judges/llama3-70b-vllm/configs.yaml").read_text()
        judge.write_text(text.replace("alpaca_eval_clf.txt", "absent.txt"))
        with pytest.raises(EvaluationError, match=r"there is no prompt file alpaca_eval_clf_gpt4_turbo/absent\.txt"):
            ask(server, tmp_path / "mine", monkeypatch, annotators_config=str(judge.parent))
        assert len(server.requests) == ROWS


# ----------------------------------------------------------------------------------------------------------------------
# Whole
# ----------------------------------------------------------------------------------------------------------------------


def test_answers_of_a_gpu_node_are_judged_where_there_is_a_network(tmp_path, monkeypatch, api_key):
    model = tmp_path / "model"
    model.mkdir()
    write_model(model)
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps(REFERENCE))
    generation = {"dtype": "float32", "max_new_tokens": 8}
    settings = {"reference": str(reference), "length_controlled": False, "generation": generation}
    assert alpaca.run(model, tmp_path / "eval", settings | {"generate_only": True}) is None
    (path,) = (model / "eval/answers").iterdir()
    versions = other_versions(path, "vllm")  # as if that had been where vLLM is
    answers, weights = path.read_bytes(), trained_fingerprint(model)
    (model / "model.safetensors").unlink()  # a machine that only judges needs no weights
    with JudgeServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("http://", "http://user:secret@"))
        result = alpaca.run(model, tmp_path / "eval", settings)
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
from rmipo.evaluation import alpaca, alpaca_length
alpaca_length.DRAWS = 12
results = []
for settings in json.loads(sys.argv[3]):
    try:
        results.append(alpaca.run(sys.argv[1], sys.argv[2], settings))
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
    model.mkdir()
    write_model(model)
    # The hub's cache, with a made-up benchmark in it.
    rows = [{"instruction": f"w{i % 20} w{i // 3}", "output": "w1 " * (1 + i % 7)} for i in range(40)]
    snapshot = tmp_path / "hub/datasets--tatsu-lab--alpaca_eval/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / REFERENCE_FILE).write_text(json.dumps(rows))
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    header = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    gamed = [
        f"{m},{i},{0.2 + 0.6 * (i % 3) / 2},{(-1) ** m * 1.5},{(i % 5) / 5 - 0.4},False"
        for m in (0, 1)
        for i in range(40)
    ]
    (snapshot / GAMED_FILE).write_text("\n".join([header, *gamed]) + "\n")
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
    message = "needs the benchmark's own 40 instructions in their order; reference and first_n give 39, 39 of them"
    assert message in refused and len(server.requests) == 41  # and one before anything is loaded
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
