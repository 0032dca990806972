"""Which models MODEL and METHOD can name where any model is taken, and what a model was trained from. Imports nothing heavy."""

import re
from pathlib import Path

from rmipo.errors import EvaluationError
from rmipo.record import recorded_run

ROOT = Path(__file__).parents[2]


def is_setting(model: str) -> bool:
    """Whether MODEL names a folder in recipes/, whose models have METHODs."""
    return (ROOT / "recipes" / model / "eval.yaml").is_file()


def known_settings() -> str:
    """For an error message."""
    return ", ".join(sorted(path.parent.name for path in ROOT.glob("recipes/*/eval.yaml")))


def check_names(model: str, methods: list[str]) -> None:
    """Raises EvaluationError unless `model` is a setting, or a folder or the id of a model on the hub without methods."""
    if is_setting(model):
        return
    if not (Path(model).expanduser().is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model)):
        raise EvaluationError(
            f"MODEL={model} is no folder, no hub id (owner/name), and there is no recipes/{model}/eval.yaml. Settings that "
            f"have one: {known_settings()}"
        )
    if methods:
        raise EvaluationError(f"METHOD={','.join(methods)} belongs to a setting, and MODEL={model} is none")


def initial_model(model_dir: str | Path, named: str | None) -> str:
    """Where the model is that preference training started from: `named`, else that of the run's recipe, else `model_dir`."""
    record = recorded_run(model_dir)
    return str(named or (record["recipe"]["model_name_or_path"] if record else model_dir))
