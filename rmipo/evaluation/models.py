"""Which models MODEL and METHOD can name where any model is taken. Nothing heavy is imported here."""

import re
from pathlib import Path

from rmipo.errors import EvaluationError

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
