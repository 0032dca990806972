"""Reading recipes that are wrong, and which recipes are a user's."""

import subprocess

import pytest

from rmipo.errors import ConfigError
from rmipo.recipe.load import load_recipe
from tests.helpers.isolation import CHECKOUT


def problems(*arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(*arguments, **keywords)
    return str(error.value)


def edited_recipes() -> set[str]:
    command = ["git", "status", "--porcelain", "--untracked-files=all", "--no-renames", "recipes"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    return {line[3:] for line in done.stdout.splitlines()}
