"""Sample generations: with the layers' own weights at a time, and nothing of the training set-up changed."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rmipo.run.generations import SampleGenerations
from rmipo.training import attention


class Trainer:
    """What `SampleGenerations` reads of a trainer: one process, nothing wrapped."""

    class args:
        device, world_size = torch.device("cpu"), 1

    class accelerator:
        @staticmethod
        def unwrap_model(model):
            return model

    def __init__(self, model):
        self.model_wrapped, self.attention_kind = model, "segment"


class Tokenizer:
    pad_token_id = 0

    @staticmethod
    def decode(ids):
        return ids.tolist()


def test_every_other_layer_stays_checkpointed():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    attention.attach(model, "segment")
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    model.train()
    (answer,) = SampleGenerations(Tokenizer, [[5, 6, 7]], Trainer(model), max_new_tokens=4).generate(seed=0)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]

    attention.attach(model, "plain")
    ids = [5, 6, 7]
    for token in answer:  # greedy, a whole forward for each token
        assert token == model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)
