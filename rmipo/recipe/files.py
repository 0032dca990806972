"""Recipes as they are written: strict YAML, command-line overrides, layers merged, values brought to their types."""

import enum
import functools
import os.path
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from rmipo.errors import ConfigError

NO_GPU = (
    "this recipe trains on GPUs, and none is visible. MODEL=tiny trains on a CPU; DRY=1 shows this run without starting it; "
    "`use_cpu: true` trains a small model on the CPU"
)


class RecipeLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` for everything that people write: recipes, overlays, overrides, settings, sweeps.

    It refuses duplicate keys, reads numbers as people write them, leaves dates as text, and is the one place that expands `~/`.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if twice := [key for key in keys if keys.count(key) > 1]:  # YAML would take the last one
            line = node.start_mark.line + 1
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} is set twice in the block that begins in line {line}")
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return os.path.expanduser(node.value) if node.value.startswith("~/") else node.value


RecipeLoader.add_constructor("tag:yaml.org,2002:str", RecipeLoader.construct_text)
# YAML 1.1 reads 010 as eight, 1:30 as ninety and 1_6 as sixteen, and finds no number in "2e-5".
NUMBERS = {
    "int": r"^[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+|0b[01]+|0x[0-9a-fA-F]+)$",  # 1_000, but not 1_6
    "float": r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
for kind, pattern in NUMBERS.items():
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), list("-+.0123456789"))


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
    layers: list[tuple[str, dict[str, Any]]] = []
    file: Path | None = Path(path)
    while file is not None:
        values = read_yaml(file)
        if str(file) in dict(layers):
            raise ConfigError(f"{file}: is its own base")
        base = values.pop("base", None)
        layers.insert(0, (str(file), values))  # the base is merged before what builds on it
        file = base and Path(os.path.normpath(file.parent / base))
    return layers


def parse_overrides(arguments: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["--learning_rate", "1e-6", "--objective.beta=2.5"]` as nested values. A key without a value means true.

    Raises ValueError for anything else, and for a key given twice.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not re.match(r"--[A-Za-z]", argument):
            raise ValueError(f"{argument!r} is not an override: expected --key value or --key=value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        *parents, last = key.split(".")
        block = values
        for parent in parents:
            block = block.setdefault(parent, {})
        if not isinstance(block, dict) or last in block:
            raise ValueError(f"--{key} is given twice")
        block[last] = override_value(text)
    return values


def override_value(text: str) -> Any:
    """A value of a command line: a number, true, false, null, a list or block in brackets, text in quotes, or else `text`.

    It is no YAML document, in which " #" begins a comment and ": " a block: a path may have both in it.
    """
    try:
        if text[:1] in ("[", "{", '"', "'"):
            loader = RecipeLoader(text)
            node = loader.get_single_node()
            return loader.construct_document(node) if node.end_mark.index == len(text) else text
        loader = RecipeLoader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_document(yaml.ScalarNode(tag, text))
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


def coerce(value: Any, annotation: Any) -> Any:
    """`value` as pydantic reads it for `annotation`, and [value] for a list of texts. Raises ValueError.

    Of `Enum | str`, a value of the enumeration as text; YAML's false is its option "no".
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    if enums := [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]:
        options = tuple(option for option in options if option is not str)
        value = "no" if value is False else value
    elif isinstance(value, str) and str not in options and any(typing.get_origin(option) is list for option in options):
        value = [value]
    try:
        typed = _adapter(options).validate_python(value)
    except pydantic.ValidationError as error:
        # Pydantic has an error for each option of a union, some of them with the same words.
        raise ValueError(" or ".join(dict.fromkeys(each["msg"] for each in error.errors()))) from error
    # Pydantic takes true for 1, so that `--max_steps --bf16` would be one step, and 1_6 for sixteen.
    number = isinstance(typed, int | float) and not isinstance(typed, bool)
    if number and (isinstance(value, bool) or (isinstance(value, str) and "_" in value)):
        raise ValueError("expected a number")
    if type(value) is int and isinstance(typed, float):  # run.json has numbers as they were written
        return value
    return typed.value if enums and isinstance(typed, enum.Enum) else typed


def typed(cls: type, values: Any, where: str | Path) -> Any:
    """A `cls`, which is a dataclass or model of pydantic's. Raises ConfigError that names every wrong key of `where`."""
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        lines = []
        for each in error.errors():
            key, message = ".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")
            message = {"unexpected_keyword_argument": "no such key", "dataclass_type": "expected keys"}.get(
                each["type"], message
            )
            found = "" if each["type"] == "missing" else f" ({each['input']!r})"
            lines.append(f"{key}{found}: {message}" if key else message)  # of several keys, which the message names
        raise ConfigError("\n  ".join([f"{where}:", *lines])) from error


@functools.cache
def _adapter(options: tuple) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(typing.Union[options], config=pydantic.ConfigDict(allow_inf_nan=False))  # noqa: UP007
