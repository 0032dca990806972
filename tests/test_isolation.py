"""No test sees or touches the checkout's outputs, the user's home or the user's environment."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

from tests.helpers.isolation import CHECKOUT, files_in_checkout
from tests.helpers.paths import ROOT

USERS = {"WANDB_API_KEY": "w", "WANDB_PROJECT": "p", "OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "u", "HF_TOKEN": "h"}
USERS |= {"HF_HOME": "/h", "XDG_CACHE_HOME": "/x", "MODEL": "tiny", "ARGS": "--seed 1", "OMP_NUM_THREADS": "8"}


def test_the_environment_is_the_tests_own():
    code = (
        "import json, os; from tests.helpers import isolation; isolation.isolate(); print(json.dumps(dict(os.environ)))"
    )
    seen = json.loads(subprocess.check_output([sys.executable, "-c", code], env=os.environ | USERS, cwd=CHECKOUT))
    assert {name: seen[name] for name in USERS if name in seen} == {"OMP_NUM_THREADS": "1"}
    for home in (Path(seen["HOME"]), Path.home()):
        assert home != Path(pwd.getpwuid(os.getuid()).pw_dir) and CHECKOUT not in home.parents


def test_programs_run_beside_the_checkout():
    assert Path.cwd() == ROOT != CHECKOUT and (ROOT / "scripts/launch.py").is_file()
    assert not (ROOT / "outputs").exists() and not (ROOT / ".git").exists()


LITTERING = """
from tests.helpers.paths import ROOT
def test_littering():
    (ROOT / "outputs/tiny").mkdir(parents=True)
    (ROOT / "stray.txt").touch()
def test_clean():
    assert not (ROOT / "outputs").exists() and not (ROOT / "stray.txt").exists()
"""


def test_a_test_that_leaves_files_fails(tmp_path):
    (tmp_path / "test_litter.py").write_text(LITTERING)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "tests.conftest", f"--rootdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "2 passed, 1 error" in done.stdout, done.stdout[-3000:]
    assert "test_littering left stray.txt in the checkout" in done.stdout
    assert str(CHECKOUT / "recipes/tiny/rmipo.yaml") in files_in_checkout()
