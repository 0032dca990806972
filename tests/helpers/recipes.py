"""Reading recipes that are wrong."""

import pytest

from rmipo.errors import ConfigError
from rmipo.recipe.load import load_recipe


def problems(*arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(*arguments, **keywords)
    return str(error.value)
