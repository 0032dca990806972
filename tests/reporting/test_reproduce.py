"""The chain behind a table: order, what counts as done, hours, and that it really runs and stops."""

import os
from pathlib import Path

import pytest

from rmipo.reporting.costs import base_method, judge_dollars, paper_hours, planned_hours
from rmipo.reporting.reproduce import chain, summary
from rmipo.reporting.tables import TABLES, build_table
from tests.helpers.paths import ROOT
from tests.helpers.result_files import write_result, write_run

LC = {"alpacaeval2_lc": 40.0, "alpacaeval2_wr": 41.0}


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> dict:
    """The steps of every table before anything has run."""
    return {number: chain(build_table(number), tmp_path_factory.mktemp("none")) for number in TABLES}


def test_steps_of_table8_for_one_model(tmp_path):
    write_run(tmp_path / "llama3-8b-instruct" / "rmipo", {"name": "rmipo"}, [])
    write_run(tmp_path / "llama3-8b-instruct" / "table8-0-2", {"name": "rmipo"}, [], finished=False)
    write_result(tmp_path, "llama3-8b-instruct", "rmipo", "alpacaeval", LC)
    steps = chain(build_table(8, ["llama3-8b-instruct"]), tmp_path)
    assert [(step.command.split(" METHOD=")[1], step.done, step.hours) for step in steps] == [
        ("table8-0-2", False, 6.75),
        ("table8-0-2 BENCH=alpacaeval", False, None),
        ("rmipo", True, 6.75),
        ("rmipo BENCH=alpacaeval", True, None),
        ("table8-0.5-1.4", False, 6.75),
        ("table8-0.5-1.4 BENCH=alpacaeval", False, None),
        ("table8-1-1.2", False, 6.75),
        ("table8-1-1.2 BENCH=alpacaeval", False, None),
    ]
    assert "6 of 8 steps left: 3 trainings, 3 evaluations" in summary(steps)
    assert "81 for 3 of the trainings" in summary(steps)  # 3 x 6.75 h x 4 GPUs


def test_every_ablation_has_an_overlay():
    runs = {cell.method for number in (3, 5, 7, 8) for cell in build_table(number).cells}
    files = {path.stem for folder in ("ablations", "methods") for path in (ROOT / "recipes" / folder).glob("*.yaml")}
    assert runs - {"rmipo"} <= files


def test_hours_of_table1_by_hand(chains):
    steps = chains[1]
    trainings = [step for step in steps if step.is_training]
    # Two Base settings start with SFT; 44 preference trainings; 12 rows x 4 settings x 2 benchmarks.
    assert len(trainings) == 2 + 44 and len(steps) == 2 + 44 + 96
    assert [step.command for step in steps[:2]] == [
        f"make train MODEL={model}-base STAGE=sft" for model in ("mistral-7b", "llama3-8b")
    ]
    # Four settings of RMiPO, SimPO, SimPER, DPO, beta-, epsilon- and alpha-DPO:
    # 4 x (6.75 + 6.17 + 6.92 + 8 + 8 + 8 + 10) h = 215.36 h, on 4 GPUs.
    assert sum(step.hours for step in trainings if not step.estimated) == pytest.approx(215.36)
    assert all(step.hours > 1 for step in trainings)
    assert "861 for 28 of the trainings." in summary(steps)
    estimated = 4 * sum(step.hours for step in trainings if step.estimated)
    assert (
        f"where the paper prints none: {estimated:.0f} for 18 trainings. The middle of `make plan`'s range. "
        "Assumed: 35% to 50% of 312 TFLOP/s" in summary(steps)
    )
    # 48 x 805 verdicts of 1500 tokens at $10 and 1 at $30; 48 x 160 of 1200 at $30 and 250 at $60, per million.
    assert sum(step.dollars for step in steps if step.dollars) == pytest.approx(48 * (12.099 + 8.16), abs=0.01)
    assert "Judges: about $972 for 96 evaluations." in summary(steps)
    assert steps[0].cost == "6.48 h on 4 GPUs, estimated" and steps[2].cost == "about $12 for the judge"
    assert base_method("table5-alpha-dpo") == "alpha-dpo" and base_method("table3-row1") == "rmipo"


def test_the_estimate_is_the_middle_of_the_plans_range():
    ours = f"{planned_hours('llama3-8b-instruct', 'rmipo'):.1f}"
    assert f"for RMiPO it says {ours} h where the paper says 6.75" in (ROOT / "docs/REPRODUCE.md").read_text()
    assert planned_hours("llama3-8b-base", "slic") < planned_hours("llama3-8b-base", "rmipo")  # no prior pass


def test_the_papers_costs_are_of_the_papers_models(tmp_path):
    assert paper_hours("tiny", "rmipo") is None and planned_hours("tiny", "rmipo") is None
    assert judge_dollars("tiny", "mtbench") == 0.0 and judge_dollars("llama3-8b-base", "leaderboard") is None
    steps = chain(build_table(7, ["tiny"]), tmp_path)
    assert {step.cost for step in steps} == {""}
    assert summary(steps).splitlines()[1:-1] == ["5 of the trainings run on the CPU."]


@pytest.mark.parametrize("number", sorted(TABLES))
def test_the_document_states_these_hours(number, chains):
    trainings = [step for step in chains[number] if step.is_training]
    hours = round(4 * sum(step.hours for step in trainings if not step.estimated))
    estimated = round(4 * sum(step.hours for step in trainings if step.estimated))
    dollars = round(sum(step.dollars for step in chains[number] if step.dollars))
    text = (ROOT / "docs" / "REPRODUCE.md").read_text()
    row = next(line for line in text.splitlines() if f"`make reproduce TABLE={number}`" in line and line[0] == "|")
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == ("2 SFT + 44" if number == 1 else str(len(trainings)))
    assert cells[4] == (f"{hours} for 28, {estimated} estimated for 18" if number == 1 else str(hours))
    assert (f"about ${dollars}" in cells[5]) == (dollars > 0)


def write_make(monkeypatch, tools: Path, log: Path, fails_on: str = "nothing") -> None:
    """A `make` that writes down how it was called."""
    tools.mkdir()
    script = tools / "make"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{fails_on}*) exit 3;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)


def test_dry_run_starts_nothing(tmp_path, run_script, monkeypatch, capfd):
    write_make(monkeypatch, tmp_path / "bin", tmp_path / "log")
    assert run_script("reproduce.py", folder=tmp_path, TABLE="7", MODEL="tiny", DRY="1") == 0
    assert "make train MODEL=tiny METHOD=table7-cosine" in capfd.readouterr().out
    assert not (tmp_path / "log").exists()


def test_runs_what_is_left_in_order_then_the_table(tmp_path, run_script, monkeypatch):
    write_make(monkeypatch, tmp_path / "bin", tmp_path / "log")
    for method in ("sft", "rmipo", "table7-linear"):
        write_run(tmp_path / "outputs" / "tiny" / method, {"name": "rmipo"}, [])
    write_result(tmp_path / "outputs", "tiny", "rmipo", "alpacaeval", LC)
    assert run_script("reproduce.py", folder=tmp_path, TABLE="7", MODEL="tiny") == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "eval MODEL=tiny METHOD=table7-linear BENCH=alpacaeval",
        "train MODEL=tiny METHOD=table7-cosine",
        "eval MODEL=tiny METHOD=table7-cosine BENCH=alpacaeval",
        "train MODEL=tiny METHOD=table7-constant",
        "eval MODEL=tiny METHOD=table7-constant BENCH=alpacaeval",
        "table N=7 MODEL=tiny",
    ]


def test_stops_at_the_first_failure(tmp_path, run_script, monkeypatch, capfd):
    write_make(monkeypatch, tmp_path / "bin", tmp_path / "log", fails_on="table7-linear")
    write_run(tmp_path / "outputs" / "tiny" / "sft", {}, [])
    assert run_script("reproduce.py", folder=tmp_path, TABLE="7", MODEL="tiny") == 1
    assert "Step 4 failed: make train MODEL=tiny METHOD=table7-linear" in capfd.readouterr().err
    assert len((tmp_path / "log").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ARGS": "--learning_rate 1e-6"}, "ARGS: not for the whole chain. Run the step that it is for by itself"),
        ({"DATA": "pairs.jsonl", "SLURM": "1"}, "DATA, SLURM: not for the whole chain"),
        ({"MODEL": "llama4"}, "MODEL=llama4 has no recipes/llama4/eval.yaml; those that have: llama3-8b-base,"),
        ({"TABLE": "4"}, "there is no table 4 to rebuild"),
    ],
)
def test_what_it_cannot_pass_on_is_refused(tmp_path, run_script, capfd, environment, message):
    assert run_script("reproduce.py", folder=tmp_path, **({"TABLE": "7", "DRY": "1"} | environment)) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.out == ""
