"""Recipes as they are written: strict YAML, command-line overrides, layers merged, values brought to their types."""

import enum
import functools
import json
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

    It refuses duplicate keys and keys that are no text, reads numbers as people write them, leaves dates as text, and is the
    one place that expands `~/`.
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int", "float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"line {line} has a block or list as a key: text with braces, such as a chat template, needs "
                    "quotes"
                )
            if key in lines:
                raise yaml.MarkedYAMLError(problem=f"{key} is set twice, in line {lines[key]} and in line {line}")
            lines[key] = line
        mapping = super().construct_mapping(node, deep)
        if odd := [key for key in mapping if not isinstance(key, str)]:
            raise yaml.MarkedYAMLError(
                problem=f"line {lines.get(str(odd[0]), node.start_mark.line + 1)} has the key {odd[0]!r}, which YAML reads "
                f"as {type(odd[0]).__name__}: expected text; put quotes around it if that is meant"
            )
        return mapping

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
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, a duplicate key, or not a mapping; with the file's name.
    """
    try:
        content = yaml.load(Path(path).read_text(), RecipeLoader)
        json.dumps(content, default=str)  # raises where an anchor holds itself
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # the last three: tags such as !!bool maybe
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: is {found}: expected `key: value` lines")
    return content


def read_layers(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file, values) of a YAML file and of the files under it, lowest first: `base: <path>` names the next one under it.

    Raises:
        ConfigError: what is wrong with one of them, with its name.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    file: Path | None = Path(path)
    while file is not None:
        values = read_yaml(file)
        base = values.pop("base", None)
        if not isinstance(base, str | None):
            raise ConfigError(f"{file}: base is {base!r}: expected the path of a recipe, from this file's folder")
        if str(file) in dict(layers):
            raise ConfigError(f"{file}: is its own base")
        layers.insert(0, (str(file), values))
        file = base and Path(os.path.normpath(file.parent / base))
    return layers


def parse_overrides(arguments: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`["--learning_rate", "1e-6", "--objective.beta=2.5"]` as nested values. A key without a value means true.

    Raises:
        ValueError: something that is neither `--key value` nor `--key=value`, or a key given twice.
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
            if not isinstance(block, dict):
                raise ValueError(f"--{key} contradicts --{parent}")
        if last in block:
            raise ValueError(f"--{key} is given twice")
        block[last] = override_value(text)
    return values


def override_value(text: str) -> Any:
    """A value of a command line: a number, true, false, null, a list or block in brackets, text in quotes, or else `text`.

    It is no YAML document, in which " #" begins a comment, and ": ", "*", "&" or "!" mean something.
    """
    try:
        loader = RecipeLoader(text if text[:1] in ("[", "{", '"', "'") else "")
        if loader.check_node():
            node = loader.get_node()
            whole = node.end_mark.index == len(text)
        else:
            tag = loader.resolve(yaml.ScalarNode, text, (True, False))
            node, whole = yaml.ScalarNode(tag, text), tag.rpartition(":")[2] in ("bool", "float", "int", "null")
        return loader.construct_document(node) if whole else os.path.expanduser(text) if text.startswith("~/") else text
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
    """`value` as `annotation` declares it: text as YAML reads it, 3.0 for 3, `no` (YAML's false) for an option "no".

    Raises:
        ValueError: it can't be read so; the message says what was expected.
    """
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    enums = [option for option in options if _is_enum(option)]
    # `Enum | str` only says that the enumeration may be spelt as text.
    options = tuple(option for option in options if not (enums and option is str))
    if isinstance(value, str) and str not in options and not enums:
        lists = any(typing.get_origin(option) is list for option in options)
        value = [value] if lists else override_value(value)
    if value is False and enums:
        value = "no"
    try:
        if {int, float} & {*options} and bool not in options:  # pydantic would take True as 1
            if isinstance(value, bool):
                raise ValueError
            if isinstance(value, int):
                return value
        if isinstance(value, str) and re.search(r"[0-9]_[0-9]", value) and str not in options and not enums:
            raise ValueError  # pydantic would read 1_6 as sixteen
        typed = _adapter(options).validate_python(value)
    except ValueError as error:  # pydantic's ValidationError is one
        raise ValueError(f"expected {' or '.join(_describe(option) for option in options)}") from error
    return typed.value if isinstance(typed, enum.Enum) else typed


@functools.cache
def _adapter(options: tuple) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(typing.Union[options], config=pydantic.ConfigDict(allow_inf_nan=False))  # noqa: UP007


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, enum.Enum)


def _describe(option: Any) -> str:
    if _is_enum(option):
        return "one of " + ", ".join(str(member.value) for member in option)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    names |= {list: "a list", dict: "a block of `key: value` lines"}
    return names.get(typing.get_origin(option) or option, str(option))
