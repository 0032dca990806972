"""ZeRO-3 that gathers parameters anew in backward, as it does for models of real size: the results of one process."""

import pytest
import torch
from torch.nn.attention import flex_attention

from tests.helpers.launched import launch
from tests.helpers.regathering_worker import CASES, save_models, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("regathering")


@pytest.fixture(scope="module")
def sharded(folder):
    save_models(folder)
    run = launch(["tests/helpers/regathering_worker.py", str(folder)], processes=2)
    assert run.wait() == 0, run.output[-6000:]
    return torch.load(folder / "sharded.pt")


@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(monkeypatch, folder, sharded, case):
    monkeypatch.setattr(flex_attention, "_validate_device", flex_attention._validate_device)  # `train` replaces it
    losses, weights, gathered_again = sharded[case]

    def full(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    expected_losses, expected = train(folder, folder / "alone", case, full)
    assert gathered_again > 0
    assert len(losses) == 6 and losses == pytest.approx(expected_losses, abs=2e-6)
    assert abs(losses[5] - losses[1]) > 1e-4  # of the evaluations: the weights do change
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=2e-6, rtol=0, msg=name)
