"""Recipes and settings as they are written: strict YAML, overrides, layers merged, values brought to their types."""

import difflib
import os.path
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rmipo.errors import ConfigError, EvaluationError

NO_GPU = "this recipe trains on GPUs, and none is visible. MODEL=tiny and recipes with `use_cpu: true` train on a CPU"


class RecipeLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` for everything that people write, with `~/` for the home: it refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:  # YAML would take the last one
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} is set twice in the block", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return os.path.expanduser(node.value) if node.value.startswith("~/") else node.value


RecipeLoader.add_constructor("tag:yaml.org,2002:str", RecipeLoader.construct_text)
EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # as in 2e-5, in which YAML 1.1 finds no number
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError with the file's name for anything else."""
    try:
        content = yaml.load(Path(path).read_text(), RecipeLoader)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `key: value` lines")
    return content


def read_layers(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file, values) of a YAML file and of the files under it, lowest first: `base: <path>` names the next one under it."""
    values = read_yaml(path)
    base = values.pop("base", None)
    below = read_layers(os.path.normpath(Path(path).parent / base)) if base else []
    return [*below, (str(path), values)]


def parse_overrides(arguments: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["--learning_rate", "1e-6", "--objective.beta=2.5", "--bf16"]` as nested values. Raises ConfigError for other words."""
    values, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"command line: {argument!r} is not an override: expected --key value or --key=value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        *parents, last = key.split(".")
        block = values
        for parent in parents:
            block = block.setdefault(parent, {})
        if not isinstance(block, dict) or last in block:
            raise ConfigError(f"command line: --{key} is given twice")
        block[last] = override_value(text)
    return values


def override_value(text: str) -> Any:
    """A value of a command line, as YAML reads it; what is no YAML is text."""
    try:
        return text if " #" in text else yaml.load(text, RecipeLoader)  # a path may have it: no comment
    except (yaml.YAMLError, ValueError):
        return text


# A later layer that sets the key on the left voids what earlier layers say about the keys on the right: they describe
# another dataset, another model, or the same quantity in another way.
DATA = ("test_split_size", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_revision")
VOIDS = {
    "dataset_name": ("datasets", *DATA),
    "datasets": ("dataset_name", *DATA),
    "test_split_size": ("dataset_test_split",),
    "model_name_or_path": ("model_revision", "prefer_local"),
    "global_batch_size": ("gradient_accumulation_steps",),
}


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`layer` over `base`. Blocks merge key by key, except that an objective of another name replaces the block."""
    voided = {key for cause in layer for key in VOIDS.get(cause, ())}
    merged = {key: value for key, value in base.items() if key not in voided}
    for key, value in layer.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            same = key != "objective" or value.get("name", old.get("name")) == old.get("name")
            value = {**old, **value} if same else value
        merged[key] = value
    return merged


def typed(kind: Any, values: Any, where: str | Path) -> Any:
    """`values` as pydantic reads them for the type `kind`. Raises ConfigError that names every wrong key of `where`."""
    try:
        typed = pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        wrong = [(": ".join(map(str, (where, *each["loc"]))), each) for each in error.errors()]
        found = ["" if each["type"] == "missing" else f" is {each['input']!r}" for _, each in wrong]
        lines = [f"{key}{value}: {each['msg']}" for (key, each), value in zip(wrong, found, strict=True)]
        raise ConfigError("\n  ".join(lines)) from error
    if isinstance(values, bool) and type(typed) in (int, float):  # pydantic takes `--max_steps --bf16` for one step
        raise ConfigError(f"{where} is {values}: expected a number")
    return values if type(values) is int and isinstance(typed, float) else typed  # run.json has numbers as written


def nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """For an error message: those of the known names that are like the unknown ones."""
    near = [name for text in unknown for name in difflib.get_close_matches(text, list(known), n=1)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


# How answers are sampled: the block `generation` of an eval.yaml.
GENERATION = {
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,  # 0: all tokens
    "max_new_tokens": 2048,
    "seed": 42,
    "batch_size": 16,  # prompts answered together by transformers; vLLM answers all at once
    "dtype": "bfloat16",
    "engine": "auto",  # that of the answers there are; else vllm where there is a GPU, else transformers
}
# Types of settings whose default does not say all. Where the default is null or "auto", so may the value be.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("first_n", "limit", "answers", "batch_size", "concurrency"), PositiveInt),
    **dict.fromkeys(("max_new_tokens", "max_prompt_length"), PositiveInt),
    **dict.fromkeys(("skip_n", "seed", "top_k", "max_missing"), NonNegativeInt),
    "max_length": Annotated[int, Field(ge=2)],
    "temperature": Annotated[float, Field(ge=0, le=2)],
    "top_p": Annotated[float, Field(gt=0, le=1)],
    "engine": Literal["auto", "transformers", "vllm"],
    "dtype": Literal["auto", "bfloat16", "float16", "float32"],
    # What lm-eval takes in place of a whole number.
    "leaderboard.batch_size": PositiveInt | Annotated[str, Field(pattern=r"^auto:[1-9]\d*$")],
    "leaderboard.limit": PositiveInt | Annotated[float, Field(gt=0, lt=1)],
}


def merge_settings(block: str, defaults: dict, settings: dict) -> dict:
    """`defaults` overridden by `settings`. Raises EvaluationError for unknown keys, and naming every wrong value."""
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise EvaluationError(f"{block}: unknown keys {unknown}{nearest(unknown, defaults)}")
    merged, problems = dict(defaults), []
    for key, value in settings.items():
        default = defaults[key]
        of_default = NonNegativeFloat if type(default) in (int, float) else Any if default is None else type(default)
        try:
            kind = TYPES.get(f"{block}.{key}", TYPES.get(key, of_default))
            merged[key] = value if value == default else typed(kind, value, f"{block}: {key}")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise EvaluationError("\n  ".join(problems))
    return merged
