"""The order in which packages may import each other (pyproject.toml), what `import rmipo` gives, how tests share code."""

import re
import subprocess
import sys
from pathlib import Path

import rmipo
from tests.helpers.paths import ROOT


def test_import_order_holds():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_exports_are_lazy_and_complete():
    code = "import sys, rmipo; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {name for name in rmipo.__all__ if getattr(rmipo, name) is None} == set()


def test_no_test_imports_from_another_test():
    """What two tests need stands in tests/helpers or in a conftest.py. Programs that tests write count too."""
    imports = re.compile(r"^\s*(from|import) tests(\.\w+)*(\.| import )(test_|conftest)", re.MULTILINE)
    assert [path for path in ROOT.glob("tests/**/*.py") if imports.search(path.read_text())] == []
    for line in (
        "from tests.run.test_twins import x",
        "    import tests.test_house",
        "from tests.run import test_twins",
    ):
        assert imports.search(line)
