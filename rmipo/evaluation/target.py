"""Which model an evaluation is of, and its settings."""

from pathlib import Path

import yaml

from rmipo.data.chat import PROBES
from rmipo.data.pairs import ChatFormat
from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS
from rmipo.launch.pipeline import named_files
from rmipo.recipe.checks import template_text
from rmipo.recipe.load import load_recipe
from rmipo.recipe.schema import ModelConfig
from rmipo.record import recorded_run
from rmipo.training.loading import load_tokenizer

BLOCKS = ("generation", *BENCHMARKS, "samples")
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

    Raises EvaluationError if it hasn't been trained to its end, and if its tokenizer isn't that of the training.
    """
    folder = outputs / recipe.parent.name / method
    if method == "initial":
        return link_initial(recipe, folder)
    known = {"rmipo", *named_files(recipe.parents[1] / "methods", recipe.parents[1] / "ablations")}
    train = (
        f"make train MODEL={recipe.parent.name} METHOD={method}" if method in known else "the command that begins it"
    )
    run = recorded_run(folder)
    if run is not None and not run["finished"]:
        raise EvaluationError(f"{folder} holds a run that hasn't finished. Go on with it: {train}")
    if (folder / "adapter_config.json").is_file():
        raise EvaluationError(f"{folder} holds an adapter. Merge it first: python scripts/merge_adapter.py --help")
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"{folder} holds no model. Train it first: {train}")
    check_trained_prompts(folder, run)
    return folder


def check_trained_prompts(folder: Path, run: dict | None) -> None:
    """Compare how the tokenizer in `folder` renders two dialogues with what training recorded in `run`, its run.json.

    Models from elsewhere have no run.json, and nothing to compare with. Raises EvaluationError where they differ.
    """
    if run is None:
        return
    chat = ChatFormat.probe(load_tokenizer(ModelConfig(model_name_or_path=str(folder))))
    for messages, ids in zip(PROBES, run["prompt_probe"], strict=True):
        now = chat.prompt_ids(messages)
        # Training may have scored the assistant header as part of the response; generation always starts after it.
        if now[: len(ids)] != ids or now[len(ids) :] not in ([], list(chat.header_ids)):
            raise EvaluationError(
                f"{folder} was trained with another chat template or tokenizer than the one now in that folder: "
                f"{messages!r} was {ids} in training (run.json) and is {now} here. "
                "Put the tokenizer files of the training back."
            )


def link_initial(recipe: Path, folder: Path) -> Path:
    """Fill `folder` with the recipe's initial model: links to its weights, its tokenizer with the recipe's template.

    Raises EvaluationError as `model_folder` does; a model trained here is held to its own run.json.
    """
    from huggingface_hub import snapshot_download

    values = load_recipe(recipe).values
    name, revision = values["model_name_or_path"], values.get("model_revision", "main")
    run = None
    if Path(name).is_dir():
        source = Path(name).resolve()
        run = recorded_run(source)
        if run is not None and not run["finished"]:
            raise EvaluationError(
                f"{name} holds a run that hasn't finished. Go on with it: make train MODEL={recipe.parent.name} STAGE=sft"
            )
    elif name.startswith("outputs/"):
        raise EvaluationError(f"{name} doesn't exist. Train it first: make train MODEL={recipe.parent.name} STAGE=sft")
    else:
        source = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(source)))
    if values.get("chat_template"):
        tokenizer.chat_template = template_text(values["chat_template"])
    tokenizer.save_pretrained(folder)
    for pattern in MODEL_FILES:
        for link in folder.glob(pattern):  # perhaps of another source: a public checkpoint before our own SFT
            link.unlink()
        for file in source.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    check_trained_prompts(folder, run)
    return folder
