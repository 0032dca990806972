"""What is installed where: the loss with torch alone, the trainers without extras, both from a wheel."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.isolation import CHECKOUT
from tests.helpers.tiny_model import write_model

TRAIN = """
import sys
from datasets import Dataset
import rmipo
from rmipo import RMiPOConfig, RMiPOTrainer
rows = [{"prompt": f"w{i}", "chosen": f"w{i} w3", "rejected": f"w4 w{i} w2"} for i in range(8)]
trainer = RMiPOTrainer(
    model=sys.argv[1],
    args=RMiPOConfig(output_dir="out", max_length=64, max_prompt_length=32, max_steps=2, report_to="none"),
    train_dataset=Dataset.from_list(rows),
)
trainer.train()
trainer.save_model()
print(rmipo.__file__)
"""


def environment_of(requirements: list[str], folder: Path) -> None:
    """A folder for PYTHONPATH with the installed packages that `requirements` bring along, and no others."""
    folder.mkdir()
    wanted, linked = [(Requirement(text), "") for text in requirements], set()
    while wanted:
        requirement, extra = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        distribution = metadata.distribution(requirement.name)
        needs = [Requirement(text) for text in distribution.requires or []]
        if (key := (distribution.name, *sorted(requirement.extras))) in linked:
            continue
        linked.add(key)
        wanted += [(need, extra) for need in needs for extra in ("", *requirement.extras)]
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))


def python(code: str, *arguments: str, path: Path, cwd: Path) -> str:
    """What `code` prints in a Python that sees the packages in `path` alone."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-S", "-P", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_package_imports_nothing_and_the_loss_torch_and_pydantic(tmp_path):
    environment_of(["torch", "pydantic"], tmp_path / "site-packages")
    (tmp_path / "site-packages/rmipo").symlink_to(CHECKOUT / "rmipo")
    code = "import sys, rmipo; print('torch' in sys.modules); from rmipo import rmipo_loss; print(rmipo_loss.__name__)"
    assert python(code, path=tmp_path / "site-packages", cwd=tmp_path) == "False\nrmipo_loss\n"


@pytest.mark.slow
def test_the_wheel_trains_in_an_environment_without_extras_and_without_the_repository(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(tmp_path / "source")], check=True)
    subprocess.run([*pip, "wheel", str(tmp_path / "source"), "--no-deps", "--wheel-dir", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("rmipo-*.whl")
    subprocess.run([*pip, "install", str(wheel), "--no-deps", "--target", str(tmp_path / "wheel")], check=True)
    (information,) = metadata.distributions(path=[str(tmp_path / "wheel")])
    needs = [text for text in information.requires if "extra ==" not in text]
    environment_of(needs, tmp_path / "site-packages")
    for path in (tmp_path / "wheel").iterdir():
        (tmp_path / "site-packages" / path.name).symlink_to(path)
    assert not {"deepspeed", "wandb", "matplotlib"} & {path.name for path in (tmp_path / "site-packages").iterdir()}
    write_model(tmp_path / "model")
    said = python(TRAIN, str(tmp_path / "model"), path=tmp_path / "site-packages", cwd=tmp_path)
    assert said.strip().endswith("site-packages/rmipo/__init__.py") and (tmp_path / "out/model.safetensors").exists()

    listing = ["git", "ls-files", "rmipo"]
    tracked = subprocess.run(listing, cwd=tmp_path / "source", capture_output=True, text=True, check=True)
    assert all((tmp_path / "wheel" / name).exists() for name in tracked.stdout.split())
