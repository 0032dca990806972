"""The order in which packages may import each other (pyproject.toml), what `import rmipo` gives, what tests run in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rmipo
from tests.helpers.isolation import CHECKOUT
from tests.helpers.paths import ROOT


def test_import_order_holds():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# Lines of Python that a folder may have. They hold what there is: raising one is a decision to defend, lowering one is the way
# to the aim.
LINES = {
    "rmipo/compare": 560,  # aim: 400
    "rmipo/constraints": 140,  # aim: 110
    "rmipo/data": 810,  # aim: 800
    "rmipo/evaluation": 1540,  # aim: 1500
    "rmipo/generation": 870,  # aim: 800
    "rmipo/launch": 620,  # aim: 600
    "rmipo/objectives": 850,  # aim: 600
    "rmipo/page": 260,
    "rmipo/plan": 420,  # aim: 450
    "rmipo/recipe": 660,
    "rmipo/reporting": 1500,  # aim: 1500
    "rmipo/run": 690,
    "rmipo/tiny": 460,
    "rmipo/training": 2020,  # aim: 1700
    "rmipo": 12000,  # aim: 11000
    "scripts": 1280,  # aim: 1100
    "benchmarks": 890,  # aim: 800
    "examples": 160,
    "tests": 14280,  # aim: 14000
}


@pytest.mark.parametrize("package", LINES)
def test_a_package_stays_within_its_lines(package):
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob(f"{package}/**/*.py")) <= LINES[package]


def test_every_package_has_a_budget():
    packages = {f"rmipo/{path.parent.name}" for path in ROOT.glob("rmipo/*/__init__.py")}
    assert packages <= LINES.keys() and sum(LINES[package] for package in packages) <= LINES["rmipo"]


def test_every_export_is_there():
    assert {name for name in rmipo.__all__ if getattr(rmipo, name) is None} == set()


def test_a_clone_named_as_the_package_does_not_hide_it(tmp_path):
    """A script beside the clone finds the clone's folder first."""
    (tmp_path / "rmipo/rmipo").mkdir(parents=True)
    (tmp_path / "script.py").write_text("from rmipo import rmipo_loss\nprint(rmipo_loss.__name__)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "rmipo_loss\n", done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, "None")],
)
def test_threads_that_wait_do_not_spin_unless_told_to(given, expected):
    """Set before torch is imported, which is when OpenMP reads it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    code = "import sys, os, rmipo; assert 'torch' not in sys.modules; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n", done.stderr


def test_programs_run_beside_the_checkout():
    assert Path.cwd() == ROOT != CHECKOUT and (ROOT / "scripts/launch.py").is_file()
    assert not (ROOT / "outputs").exists() and not (ROOT / ".git").exists()
