"""The order in which packages may import each other (pyproject.toml), and what `import rmipo` gives."""

import subprocess
import sys
from pathlib import Path

import rmipo

ROOT = Path(__file__).parents[1]


def test_import_order_holds():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_exports_are_lazy_and_complete():
    code = "import sys, rmipo; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {name for name in rmipo.__all__ if getattr(rmipo, name) is None} == set()
