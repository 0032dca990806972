"""Which model an evaluation is of, and its settings."""

from pathlib import Path

import yaml

from rmipo.config import load_recipe
from rmipo.recipe_checks import template_text

from . import EvaluationError

BLOCKS = ("generation", "alpacaeval", "mtbench", "leaderboard", "hh", "samples")
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def load_settings(path: Path, overrides: list[str]) -> dict[str, dict]:
    """The blocks of an eval.yaml, with overrides such as "alpacaeval.max_cost=5" over them.

    Raises EvaluationError for a file or an override that isn't of that form.
    """
    if not path.is_file():
        known = sorted(folder.parent.name for folder in path.parent.parent.glob("*/eval.yaml"))
        raise EvaluationError(f"{path} doesn't exist; there are settings for MODEL={', '.join(known)}")
    settings = yaml.safe_load(path.read_text())
    for override in overrides:
        key, equals, value = override.partition("=")
        block, dot, name = key.partition(".")
        if not (equals and dot):
            raise EvaluationError(f"--set {override}: expected <block>.<key>=<value>, e.g. alpacaeval.max_cost=5")
        settings.setdefault(block, {})[name] = yaml.safe_load(value)
    unknown = sorted(settings.keys() - set(BLOCKS))
    if unknown:
        raise EvaluationError(f"{path}: unknown blocks {unknown}; it has {list(BLOCKS)}")
    return settings


def model_folder(recipe: Path, outputs: Path, method: str) -> Path:
    """The folder of the model trained with `method`; "initial" is the one that preference training starts from.

    Raises EvaluationError if it hasn't been trained.
    """
    folder = outputs / recipe.parent.name / method
    if method == "initial":
        return link_initial(recipe, folder)
    if (folder / "adapter_config.json").is_file():
        raise EvaluationError(f"{folder} holds an adapter. Merge it first: python scripts/merge_adapter.py --help")
    if not (folder / "config.json").is_file():
        raise EvaluationError(
            f"{folder} holds no model. Train it first: make train MODEL={recipe.parent.name} METHOD={method}"
        )
    return folder


def link_initial(recipe: Path, folder: Path) -> Path:
    """Fill `folder` with the recipe's initial model: links to its weights, its tokenizer with the recipe's template."""
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    values = load_recipe(recipe).values
    name, revision = values["model_name_or_path"], values.get("model_revision", "main")
    if Path(name).is_dir():
        source = Path(name).resolve()
    elif name.startswith("outputs/"):
        raise EvaluationError(f"{name} doesn't exist. Train it first: make train MODEL={recipe.parent.name} STAGE=sft")
    else:
        source = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    tokenizer = AutoTokenizer.from_pretrained(source)
    if values.get("chat_template"):
        tokenizer.chat_template = template_text(values["chat_template"])
    tokenizer.save_pretrained(folder)
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            link = folder / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
    return folder
