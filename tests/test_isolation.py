"""No test sees or touches the checkout's outputs, the user's home or the user's environment."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

from tests.helpers.isolation import CHECKOUT
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
