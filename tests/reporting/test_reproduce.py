"""The chain behind a table: order, what counts as done, hours, and that it really runs and stops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmipo.reporting.chain import base_method, chain, summary
from rmipo.reporting.tables import build_table
from tests.reporting.files import write_result, write_run

ROOT = Path(__file__).parents[2]
LC = {"alpacaeval2_lc": 40.0, "alpacaeval2_wr": 41.0}


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
    runs = {cell.method for number in (3, 5, 7, 8) for row in build_table(number).cells for cell in row}
    files = {path.stem for folder in ("ablations", "methods") for path in (ROOT / "recipes" / folder).glob("*.yaml")}
    assert runs - {"rmipo"} <= files


def test_hours_of_table1_by_hand(tmp_path):
    steps = chain(build_table(1), tmp_path)
    trainings = [step for step in steps if step.is_training]
    # Two Base settings start with SFT; 44 preference trainings; 12 rows x 4 settings x 2 benchmarks.
    assert len(trainings) == 2 + 44 and len(steps) == 2 + 44 + 96
    assert [step.command for step in steps[:2]] == [
        f"make train MODEL={model}-base STAGE=sft" for model in ("mistral-7b", "llama3-8b")
    ]
    # Four settings of RMiPO, SimPO, SimPER, DPO, beta-, epsilon- and alpha-DPO:
    # 4 x (6.75 + 6.17 + 6.92 + 8 + 8 + 8 + 10) h = 215.36 h, on 4 GPUs.
    assert sum(step.hours for step in trainings if step.hours) == pytest.approx(215.36)
    assert "861 for 28 of the trainings" in summary(steps)
    assert "for the other 18" in summary(steps)
    assert base_method("table5-alpha-dpo") == "alpha-dpo" and base_method("table3-row1") == "rmipo"


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 8])
def test_the_document_states_these_hours(number, tmp_path):
    trainings = [step for step in chain(build_table(number), tmp_path) if step.is_training]
    hours = round(4 * sum(step.hours for step in trainings if step.hours))
    text = (ROOT / "docs" / "REPRODUCE.md").read_text()
    row = next(line for line in text.splitlines() if f"`make reproduce TABLE={number}`" in line and line[0] == "|")
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == ("2 SFT + 44" if number == 1 else str(len(trainings)))
    assert cells[4].split()[0] == str(hours)


def reproduce(outputs: Path, tools: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "--outputs", str(outputs)],
        capture_output=True,
        text=True,
        env={"PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin", **environment},
    )


def write_make(tools: Path, log: Path, fails_on: str = "nothing") -> None:
    """A `make` that writes down how it was called."""
    tools.mkdir()
    script = tools / "make"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{fails_on}*) exit 3;; esac\n')
    script.chmod(0o755)


def test_dry_run_starts_nothing(tmp_path):
    write_make(tmp_path / "bin", tmp_path / "log")
    done = reproduce(tmp_path / "outputs", tmp_path / "bin", TABLE="7", MODEL="tiny", DRY="1")
    assert done.returncode == 0 and "make train MODEL=tiny METHOD=table7-cosine" in done.stdout
    assert not (tmp_path / "log").exists()


def test_runs_what_is_left_in_order_then_the_table(tmp_path):
    write_make(tmp_path / "bin", tmp_path / "log")
    for method in ("sft", "rmipo", "table7-linear"):
        write_run(tmp_path / "outputs" / "tiny" / method, {"name": "rmipo"}, [])
    write_result(tmp_path / "outputs", "tiny", "rmipo", "alpacaeval", LC)
    done = reproduce(tmp_path / "outputs", tmp_path / "bin", TABLE="7", MODEL="tiny")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().splitlines() == [
        "eval MODEL=tiny METHOD=table7-linear BENCH=alpacaeval",
        "train MODEL=tiny METHOD=table7-cosine",
        "eval MODEL=tiny METHOD=table7-cosine BENCH=alpacaeval",
        "train MODEL=tiny METHOD=table7-constant",
        "eval MODEL=tiny METHOD=table7-constant BENCH=alpacaeval",
        "table N=7 MODEL=tiny",
    ]


def test_stops_at_the_first_failure(tmp_path):
    write_make(tmp_path / "bin", tmp_path / "log", fails_on="table7-linear")
    write_run(tmp_path / "outputs" / "tiny" / "sft", {}, [])
    done = reproduce(tmp_path / "outputs", tmp_path / "bin", TABLE="7", MODEL="tiny")
    assert done.returncode == 1 and "Step 4 failed: make train MODEL=tiny METHOD=table7-linear" in done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) == 3
