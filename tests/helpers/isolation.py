"""What keeps the tests apart from the user's environment, home, caches and checkout; conftest.py sets it up.

`paths.ROOT`, where tests run the repository's programs, is a folder of links to the checkout's files: it has no outputs/
of earlier runs, and what a program writes there is gone after the test.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
LINKED = "ROOT_OF_TESTS"
NOT_LINKED = {"outputs", "wandb", "__pycache__"}
# What a program needs to start, and what people tell the tests.
KEPT = {"PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME", "SHELL", "TERM", "VIRTUAL_ENV"}
KEPT |= {"CUDA_VISIBLE_DEVICES", "CUDA_HOME", "WRITE_TABLE", "ALPACA_EVAL_RESULTS"}
KEPT |= {"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"}
KEPT_PREFIXES = ("PYTEST_", "PYTHON", "PIP_")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
}


def isolate() -> Path:
    """Replace the environment, before any library reads it; returns the folder that holds home and links."""
    scratch = Path(tempfile.mkdtemp(prefix="rmipo-tests-"))
    for name in [name for name in os.environ if name not in KEPT and not name.startswith(KEPT_PREFIXES)]:
        del os.environ[name]
    home, root = scratch / "home", scratch / "checkout"
    home.mkdir()
    root.mkdir()
    for path in CHECKOUT.iterdir():
        if path.name not in NOT_LINKED and (path.name == ".venv" or not path.name.startswith(".")):
            (root / path.name).symlink_to(path)
    os.environ |= OFFLINE | {"HOME": str(home), LINKED: str(root)}
    # DeepSpeed compiles its communication for CPUs on first use: a minute that each home would take again. It is kept
    # with the environment whose torch it is compiled for.
    os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(sys.prefix, "torch_extensions")
    return scratch


def files_in_checkout() -> set[str]:
    """Every file of the checkout that a program could write through the links. Caches of Python and tools don't count."""
    found = set()
    for folder, folders, files in os.walk(CHECKOUT):
        if folder == str(CHECKOUT):
            folders[:] = [name for name in folders if name not in NOT_LINKED]
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found.update(os.path.join(folder, name) for name in files if not name.startswith("."))
    return found


def clear(root: Path) -> list[str]:
    """Remove what a test wrote into `root`; names what lies outside outputs/, where programs write unless told else."""
    strays = []
    for path in root.iterdir():
        if not path.is_symlink():
            strays += [path.name] if path.name != "outputs" else []
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return strays
