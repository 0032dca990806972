"""The chain behind a table: order, what counts as done, hours, and that it really runs and stops."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rmipo.reporting.tables import TABLES, build_table
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.result_files import write_result, write_run


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[int, list[str]]:
    """What `make reproduce` lists of every table before anything has run."""
    folder = tmp_path_factory.mktemp("none")
    found = {}
    for number in TABLES:
        environment = os.environ | {"TABLE": str(number), "DRY": "1", "MODEL": "", "ARGS": ""}
        command = [sys.executable, str(ROOT / "scripts/reproduce.py")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found[number] = re.findall(r"^ *\d+ (make .*)$", done.stdout, re.MULTILINE)
        assert f"{len(found[number])} steps left: " in done.stdout
    return found


def test_every_ablation_has_an_overlay():
    runs = {cell.method for number in (3, 5, 7, 8) for cell in build_table(number).cells.itertuples()}
    files = {path.stem for folder in ("ablations", "methods") for path in (ROOT / "recipes" / folder).glob("*.yaml")}
    assert runs - {"rmipo"} <= files


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


@pytest.mark.parametrize("number", sorted(TABLES))
def test_the_document_states_how_many_trainings(number, steps):
    trainings = sum(step.startswith("make train") for step in steps[number])
    text = (ROOT / "docs" / "REPRODUCE.md").read_text()
    row = next(line for line in text.splitlines() if f"`make reproduce TABLE={number}`" in line and line[0] == "|")
    assert row.split("|")[3].strip() == ("2 SFT + 44" if number == 1 else str(trainings))


def write_make(monkeypatch, tools: Path, log: Path, fails_on: str = "nothing") -> None:
    """A `make` that writes down how it was called."""
    tools.mkdir()
    script = tools / "make"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{fails_on}*) exit 3;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)


def test_runs_what_is_left_in_order_then_the_table(tmp_path, monkeypatch):
    write_make(monkeypatch, tmp_path / "bin", tmp_path / "log")
    for method in ("sft", "rmipo", "table7-linear"):
        write_run(tmp_path / "outputs" / "tiny" / method, {"name": "rmipo"}, [])
    # Without the number that the table wants: nothing is deleted unasked.
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
    assert ended.code == 1 and "Step 3 failed: make train MODEL=tiny METHOD=table7-linear" in ended.err
    assert len((tmp_path / "log").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("environment", "named"),
    [({"ARGS": "--learning_rate 1e-6"}, "ARGS"), ({"MODEL": "llama4"}, "MODEL=llama4"), ({"TABLE": "4"}, "table 4")],
)
def test_what_it_cannot_pass_on_is_refused(tmp_path, environment, named):
    ended = run_here("reproduce", folder=tmp_path, env={"TABLE": "7", "DRY": "1"} | environment)
    assert ended.code == 2 and ended.err.startswith("error: ") and named in ended.err and ended.out == ""
