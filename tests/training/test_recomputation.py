"""What backward computes again changes no gradient."""

import pytest
import torch

from tests.helpers.small_models import make_model, make_pairs
from tests.helpers.trainers import make_trainer


def gradients(folder, recomputed: list[bool], **arguments) -> dict[str, torch.Tensor]:
    """One SGD step with a learning rate of 1: the change of the weights is the gradient."""
    model = make_model("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}
    make_trainer(folder, make_pairs(8, seed=4), model=model, **settings, **arguments).train()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == recomputed
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["segment", "dense"])
@pytest.mark.parametrize(("every", "recomputed"), [(1, [True, True]), (2, [True, False])])
def test_recomputing_layers_changes_no_gradient(tmp_path, attention, every, recomputed):
    kwargs = {"use_reentrant": False, "every_n_layers": every}
    expected = gradients(tmp_path / "none", [False, False], attention=attention, activation_checkpointing=False)
    found = gradients(
        tmp_path / "some", recomputed, attention=attention, activation_checkpointing=True,
        activation_checkpointing_kwargs=kwargs,
    )  # fmt: skip
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)
