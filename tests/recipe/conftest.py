"""Recipes written for a test."""

import pytest
import yaml


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write
