"""Results that were made in different ways don't share a table: each kind of mix, and what is no mix."""

import os
import re
from pathlib import Path

import pytest

from rmipo.evaluation import BENCHMARKS
from rmipo.reporting.results import ReportError, conflicts, deviations, load_result
from rmipo.reporting.tables import TABLES, build_table, fill
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.result_files import DECODING, write_result, write_run

SCORES = dict.fromkeys(("ifeval", "bbh", "math", "gpqa", "musr", "mmlu_pro"), 10.0)
BENCHES = {"mtbench": {"mt_bench": 5.0}, "leaderboard": SCORES, "alpacaeval": {"alpacaeval2_wr": 5.0}, "hh": {}}


def compare(outputs, bench, first, second, models=("tiny", "tiny")) -> list[str]:
    """Texts of the conflicts between two results; `first` and `second` are what their files differ in."""
    for model, method, facts in ((models[0], "dpo", first), (models[1], "rmipo", second)):
        write_result(outputs, model, method, bench, BENCHES.get(bench, {}), **facts)
    results = [load_result(outputs, models[0], "dpo", bench), load_result(outputs, models[1], "rmipo", bench)]
    return [text.replace(f"{outputs}/", "") for text in conflicts(results)]


def files(bench, first, second) -> str:
    return f"{first} in tiny/dpo/eval/{bench}.json; {second} in tiny/rmipo/eval/{bench}.json"


def test_a_package_that_only_one_has_is_a_mix(tmp_path):
    first, second = ({"versions": {"torch": "2.13.0", engine: "5.22.0"}} for engine in ("vllm", "transformers"))
    assert compare(tmp_path, "mtbench", first, second) == [
        f"mtbench: versions.transformers {files('mtbench', 'absent', '5.22.0')}",
        f"mtbench: versions.vllm {files('mtbench', '5.22.0', 'absent')}",
    ]


# What decides a benchmark's numbers, written out a second time: without one of these names two judges share a table.
DECISIVE = {
    "alpacaeval": "annotators_config judge_sha256 judge_endpoint reference_sha256 first_n",
    "mtbench": "judge_model judge_endpoint max_new_tokens first_n",
    "leaderboard": "include_path dtype limit",
    "hh": "helpful harmless pairs_sha256.helpful pairs_sha256.harmless limit max_length max_prompt_length dtype",
    "reward": "model model_fingerprint reference_sha256 first_n dtype",
    "specificity": "prompts split first_n initial_fingerprint generation.temperature generation.max_new_tokens",
    "ranking": "prompts_sha256 first_n skip_n answers initial_fingerprint generation.temperature generation.seed",
    "constraints": "first_n skip_n answers generation.temperature generation.top_p generation.max_new_tokens",
}


@pytest.mark.parametrize("bench", DECISIVE)
def test_results_that_differ_in_what_decides_them_are_a_mix(tmp_path, bench):
    assert DECISIVE.keys() == {name for name, benchmark in BENCHMARKS.items() if benchmark.metrics}
    for name in DECISIVE[bench].split():
        block, _, key = name.rpartition(".")
        first, second = ({"settings": {block: {key: value}} if block else {key: value}} for value in ("a", "b"))
        texts = compare(tmp_path, bench, first, second)
        assert any(text.startswith(f"{bench}: {name} {files(bench, 'a', 'b')}") for text in texts), name


def test_what_is_not_made_as_the_paper_s_is_said(tmp_path):
    decoding = DECODING["llama3-8b-base"]
    changes = {
        "alpacaeval": [{"annotators_config": "mine"}, {"judge_sha256": "0a"}, {"judge_endpoint": "127.0.0.1:8000/v1"}],
        "mtbench": [{"judge_model": "gpt-5"}, {"max_new_tokens": 64}],
    }
    for bench, found in changes.items():
        more = {"alpacaeval": {"top_p": 0.5}, "mtbench": {"top_k": 40}}[bench]
        for change in ({}, *found, {"generation": decoding | more}):
            write_result(tmp_path, "llama3-8b-base", "rmipo", bench, {}, settings=change)
            said = deviations(load_result(tmp_path, "llama3-8b-base", "rmipo", bench))
            assert len(said) == len(change) and all("the paper's is" in text for text in said)


def test_mixes_are_of_decoding_within_a_model_and_not_of_costs_or_subsets(tmp_path):
    first, second = ({"settings": {"generation": {"temperature": t, "batch_size": 8 * t}}} for t in (0.9, 0.1))
    expected = f"alpacaeval tiny: generation.temperature {files('alpacaeval', '0.9', '0.1')}"
    assert compare(tmp_path, "alpacaeval", first, second) == [expected]
    assert compare(tmp_path, "alpacaeval", first, second, models=("llama3-8b-base", "mistral-7b-base")) == []
    one = {"helpful": {"dataset_name": "a"}, "harmless": None, "pairs_sha256": {"helpful": "0a"}}
    both = {"helpful": {"dataset_name": "a"}, "harmless": {"dataset_name": "b"}}
    both |= {"pairs_sha256": {"helpful": "0a", "harmless": "0b"}}
    assert compare(tmp_path, "hh", {"settings": one}, {"settings": both}) == []
    costs = [{"settings": {"price": [price, 1.0], "max_cost": price, "concurrency": 4}} for price in (1.0, 2.0)]
    assert compare(tmp_path, "mtbench", *costs) == []


def test_tables_refuse_mixes(tmp_path):
    write_result(tmp_path, "llama3-8b-instruct", "rmipo", "leaderboard", SCORES)
    write_result(tmp_path, "llama3-8b-instruct", "dpo", "leaderboard", SCORES, versions={"lm_eval": "0.4.9"})
    table = build_table(2, ["llama3-8b-instruct"])
    with pytest.raises(ReportError, match=r"0\.4\.9 in .*dpo/eval/leaderboard\.json.*0\.4\.13 in .*rmipo"):
        fill(table, tmp_path)


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[int, list[str]]:
    folder = tmp_path_factory.mktemp("none")
    found = {}
    for number in TABLES:
        done = run_here("reproduce", folder=folder, env={"TABLE": str(number), "DRY": "1", "MODEL": "", "ARGS": ""})
        found[number] = re.findall(r"^ *\d+ (make .*)$", done.out, re.MULTILINE)
        assert done.code == 0 and f"{len(found[number])} steps left: " in done.out
    return found


def test_the_steps_of_table1(steps):
    # Two Base settings start with SFT; 44 preference trainings; 12 rows x 4 settings x 2 benchmarks.
    trainings = [step for step in steps[1] if step.startswith("make train")]
    assert len(trainings) == 2 + 44 and len(steps[1]) == 2 + 44 + 96 == len({*steps[1]})
    assert [step for step in trainings if "STAGE=sft" in step] == [
        f"make train MODEL={model}-base STAGE=sft" for model in ("mistral-7b", "llama3-8b")
    ]
    for training in trainings:  # before its evaluations
        model, method = re.search(r"MODEL=(\S+) (?:METHOD=(\S+))?", training).groups()
        evaluation = f"make eval MODEL={model} METHOD={method or 'initial'} BENCH=alpacaeval"
        assert steps[1].index(training) < steps[1].index(evaluation)


def test_the_document_states_how_many_trainings_and_every_ablation_has_an_overlay(steps):
    text = (ROOT / "docs" / "REPRODUCE.md").read_text()
    for number in TABLES:
        trainings = sum(step.startswith("make train") for step in steps[number])
        row = next(line for line in text.splitlines() if f"`make reproduce TABLE={number}`" in line and line[0] == "|")
        assert row.split("|")[3].strip() == ("2 SFT + 44" if number == 1 else str(trainings))
    runs = {cell.method for number in (3, 5, 7, 8) for cell in build_table(number).cells.itertuples()}
    files = {path.stem for folder in ("ablations", "methods") for path in (ROOT / "recipes" / folder).glob("*.yaml")}
    assert runs - {"rmipo"} <= files


def write_make(monkeypatch, tools: Path, log: Path, fails_on: str = "nothing") -> None:
    tools.mkdir()
    script = tools / "make"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{fails_on}*) exit 3;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)


def test_runs_what_is_left_in_order_then_the_table(tmp_path, monkeypatch):
    write_make(monkeypatch, tmp_path / "bin", tmp_path / "log")
    for method in ("sft", "rmipo", "table7-linear"):
        write_run(tmp_path / "outputs" / "tiny" / method, {"name": "rmipo"}, [])
    write_result(tmp_path / "outputs", "tiny", "rmipo", "alpacaeval", {"alpacaeval2_wr": 41.0})
    assert run_here("reproduce", folder=tmp_path, env={"TABLE": "7", "MODEL": "tiny"}).code == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "eval MODEL=tiny METHOD=table7-linear BENCH=alpacaeval",
        "train MODEL=tiny METHOD=table7-cosine",
        "eval MODEL=tiny METHOD=table7-cosine BENCH=alpacaeval",
        "train MODEL=tiny METHOD=table7-constant",
        "eval MODEL=tiny METHOD=table7-constant BENCH=alpacaeval",
        "table N=7 MODEL=tiny",
    ]


def test_stops_at_the_first_failure(tmp_path, monkeypatch):
    write_make(monkeypatch, tmp_path / "bin", tmp_path / "log", fails_on="table7-linear")
    write_run(tmp_path / "outputs" / "tiny" / "sft", {}, [])
    ended = run_here("reproduce", folder=tmp_path, env={"TABLE": "7", "MODEL": "tiny"})
    assert ended.code == 1 and "METHOD=table7-linear" in ended.err
    assert len((tmp_path / "log").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("environment", "named"),
    [({"ARGS": "--learning_rate 1e-6"}, "ARGS"), ({"MODEL": "llama4"}, "MODEL=llama4"), ({"TABLE": "4"}, "table 4")],
)
def test_what_it_cannot_pass_on_is_refused(tmp_path, environment, named):
    ended = run_here("reproduce", folder=tmp_path, env={"TABLE": "7", "DRY": "1"} | environment)
    assert ended.code == 2 and ended.err.startswith("error: ") and named in ended.err and ended.out == ""
