"""Layers compiled one by one (torch_compile: true): the training of uncompiled ones."""

import pytest
import torch

from tests.helpers.small_models import make_model, make_pairs
from tests.helpers.trainers import make_trainer


@pytest.mark.slow
def test_compiled_layers_train_as_uncompiled_ones(tmp_path):
    weights = {}
    for compiled in (False, True):
        trainer = make_trainer(
            tmp_path / str(compiled), make_pairs(4, seed=4), model=make_model("llama"), global_batch_size=2, max_steps=2,
            learning_rate=1e-3, attention="dense", torch_compile=compiled,
        )  # fmt: skip
        trainer.train()
        layers = trainer.model_wrapped.model.layers
        assert [isinstance(layer, torch._dynamo.OptimizedModule) for layer in layers] == [compiled] * len(layers)
        weights[compiled] = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    for name, weight in weights[True].items():
        torch.testing.assert_close(weight, weights[False][name], atol=1e-5, rtol=0, msg=name)
