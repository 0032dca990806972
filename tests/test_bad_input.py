"""Every bad input ends with one message that names the key, file or row, before any model is made."""

import pytest
from transformers import PreTrainedModel

from tests.helpers.bad_input import CASES, Bench


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(pristine, tmp_path, monkeypatch, request):
    """A fresh copy of the bench, in which no model can be made. (Planning makes some, without weights.)"""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(pristine.folder / name)
    fresh = object.__new__(Bench)
    fresh.folder = tmp_path

    def made(self, *arguments, **keywords):
        raise AssertionError("a model was made before the input was refused")

    if request.getfixturevalue("case").area not in ("device", "plan"):
        monkeypatch.setattr(PreTrainedModel, "__init__", made)
    return fresh


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.what}"[:60])
def test_bad_input(case, bench):
    message = case.run(bench)
    for part in case.said:
        assert part in message
