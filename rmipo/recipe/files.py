"""Recipes as they are written: strict YAML, command-line overrides, layers merged, values brought to their types."""

import enum
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses duplicate keys, reads `2e-5` as a number and leaves dates as text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise yaml.MarkedYAMLError(problem=f"{key} is set twice, in line {lines[key]} and in line {line}")
            lines[key] = line
        return super().construct_mapping(node, deep)


# YAML 1.1 has no number in "2e-5": it wants a dot.
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: no such file, not YAML, a duplicate key, or not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(), RecipeLoader)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not a valid recipe: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds {type(content).__name__}: expected `key: value` lines")
    return content


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
            raise ValueError(f"{argument!r} is no override: expected --key value or --key=value")
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
        block[last] = _override_value(text)
    return values


def _override_value(text: str) -> Any:
    try:
        value = yaml.load(text, RecipeLoader)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict | list) and text[0] not in "[{" else value


# A later layer that sets the key on the left voids what earlier layers say about the keys on the right: they describe
# another dataset, another model, or the same quantity in another way.
DATA = ("test_split_size", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_revision")
VOIDS = {
    "dataset_name": ("datasets", *DATA),
    "datasets": ("dataset_name", *DATA),
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
    """`value` as `annotation` declares it: numbers in text, 3.0 for 3, `no` (YAML's false) for an option named "no".

    Raises:
        ValueError: it can't be read so; the message says what was expected.
    """
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    enums = [option for option in options if _is_enum(option)]
    # `Enum | str` only says that the enumeration may be spelt as text.
    options = [option for option in options if not (enums and option is str)]
    options.sort(key=lambda option: type(value) is not option)  # a value of a declared type stays as it is
    for option in options:
        try:
            return _coerce_to(value, option)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    raise ValueError(f"expected {' or '.join(_describe(option) for option in options)}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, enum.Enum)


def _coerce_to(value: Any, option: Any) -> Any:
    kind = typing.get_origin(option) or option
    if option is Any:
        return value
    if kind is typing.Literal:
        return _checked(value, value in typing.get_args(option))
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()]
    if type(value) is int and kind in (int, float):
        return value
    if kind is float:
        return _checked(_number(value), math.isfinite(_number(value)))
    if kind is int:
        return int(_checked(_number(value), _number(value).is_integer()))
    if kind is list:
        items = value if isinstance(value, list) else [_checked(value, isinstance(value, str))]
        return [coerce(item, item_type) for item in items for item_type in typing.get_args(option) or (Any,)]
    if _is_enum(kind):
        return kind("no" if value is False else value).value
    return _checked(value, isinstance(value, kind))


def _number(value: Any) -> float:
    return float(_checked(value, isinstance(value, int | float | str) and not isinstance(value, bool)))


def _checked(value: Any, accepted: bool) -> Any:
    if not accepted:
        raise ValueError
    return value


def _describe(option: Any) -> str:
    if _is_enum(option):
        return "one of " + ", ".join(str(member.value) for member in option)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    names |= {list: "a list", dict: "a block of `key: value` lines"}
    return names.get(typing.get_origin(option) or option, str(option))
