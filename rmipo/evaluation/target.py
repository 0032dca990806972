"""Which model an evaluation is of, and its settings."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from rmipo.data.chat import PROBES, ChatFormat
from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS
from rmipo.launch.choices import ROOT, check_names, is_setting
from rmipo.recipe.files import GENERATION, merge, merge_settings, parse_overrides, read_yaml
from rmipo.recipe.schema import ModelConfig
from rmipo.record import recorded_run
from rmipo.training.loading import load_tokenizer

SAMPLES = {"prompts": None, "reference": None, "first_n": None}
BLOCKS = {"generation": GENERATION, "samples": SAMPLES} | {name: b.defaults for name, b in BENCHMARKS.items()}
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")  # neither pickles nor code are even downloaded


class Target(NamedTuple):
    folder: Path
    settings: dict[str, dict]  # the blocks of an eval.yaml


def find_target(
    model: str, method: str | None, outputs: Path, overrides: list[str], settings_file: Path | None = None
) -> Target:
    """The model that MODEL and METHOD name: a setting with its method, a folder, or a hub id, perhaps with "@revision".

    Only a setting has an eval.yaml (`settings_file` takes its place); other models are sampled as their own
    generation_config.json says. A model of the hub is linked into `outputs`/<owner>--<name>/initial.
    Raises EvaluationError for a model that isn't there or wasn't trained to its end, and for wrong settings.
    """
    check_names(model, [] if method is None else [method])
    # A setting's name wins over a folder of that name.
    if is_setting(model):
        recipe = ROOT / "recipes" / model / "rmipo.yaml"
        folder = model_folder(recipe, outputs, method or "rmipo")
        return Target(folder, load_settings(settings_file or recipe.with_name("eval.yaml"), overrides))
    folder = Path(model).expanduser()
    if folder.is_dir():
        check_model(folder)
    else:
        name, _, revision = model.partition("@")
        folder = outputs / model.replace("/", "--") / "initial"
        link_model(Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES)), folder)
    from rmipo.generation.answers import own_settings  # a setting says how its models are sampled

    return Target(folder, load_settings(settings_file or {"generation": own_settings(folder)}, overrides))


def load_settings(source: Path | dict[str, dict], overrides: list[str]) -> dict[str, dict]:
    """The blocks of an eval.yaml, with overrides such as "alpacaeval.max_cost=5" over them. Raises UserError for wrong ones."""
    blocks = source if isinstance(source, dict) else read_yaml(source)
    blocks = merge(blocks, parse_overrides([f"--{text}" for text in overrides]))
    settings = {block: values or {} for block, values in blocks.items()}  # a block without keys is null in YAML
    merge_settings("settings", BLOCKS, settings)  # the names of the blocks
    for block, values in settings.items():
        merge_settings(block, BLOCKS[block], values)
        merge_settings(f"{block}, generation", GENERATION, values.get("generation", {}))
    return settings


def model_folder(recipe: Path, outputs: Path, method: str) -> Path:
    """The folder of the model trained with `method`; "initial" is the one that preference training starts from.

    The latter is filled with links to the weights, and the tokenizer with the recipe's template. Raises EvaluationError.
    """
    folder = outputs / recipe.parent.name / method
    if method != "initial":
        check_model(folder)
        return folder
    from rmipo.recipe.load import load_recipe, template_text  # a trained model needs no recipe

    values = load_recipe(recipe).values
    name, revision = values["model_name_or_path"], values.get("model_revision")
    # Half-trained weights would pass for the start of preference training.
    run = finished_run(Path(name))
    if not Path(name).is_dir():
        name = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES)
    link_model(Path(name), folder, template_text(values.get("chat_template")))
    check_trained_prompts(folder, run)
    return folder


def check_model(folder: Path) -> None:
    """Raises EvaluationError unless `folder` has a whole model that was trained to its end, if it was trained here."""
    run = finished_run(folder)
    if (folder / "adapter_config.json").is_file():
        raise EvaluationError(f"{folder} holds an adapter: merge it first, .venv/bin/python scripts/merge_adapter.py")
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"{folder} holds no model: train one, make train MODEL=... METHOD=...")
    check_trained_prompts(folder, run)


def finished_run(folder: Path) -> dict | None:
    """The run.json in `folder`, None without one. Raises EvaluationError for a run that hasn't finished."""
    run = recorded_run(folder)
    if run is not None and not run["finished"]:
        raise EvaluationError(f"{folder} holds a run that hasn't finished: go on with it")
    return run


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
            where = f"{folder} was trained with another chat template or tokenizer than is now there"
            raise EvaluationError(f"{where}: {messages!r} was {ids} and is {now}. Put the training's files back")


def link_model(source: Path, folder: Path, chat_template: str | None = None) -> None:
    """Fill `folder` with links to the model in `source`, and with its tokenizer, which may get another template."""
    # Written and not linked: the template may be the recipe's.
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(source)), chat_template)
    # transformers saves with it whether the machine was offline, and results would be taken for another tokenizer's.
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(folder)
    for pattern in MODEL_FILES:
        for link in folder.glob(pattern):  # perhaps of another source: a public checkpoint before our own SFT
            link.unlink()
        for file in source.glob(pattern):
            (folder / file.name).unlink(missing_ok=True)  # a link to what has gone, which `glob` may not find
            (folder / file.name).symlink_to(file.resolve())
