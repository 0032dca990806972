"""Sample generations: with the layers' own weights at a time, and nothing of the training set-up changed."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rmipo.record import read_generations
from rmipo.run.generations import SampleGenerations
from rmipo.training import attention
from tests.helpers.twins import make_twin, run


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


def test_answers_end_where_the_model_has_no_more_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=6, n_embd=32, n_layer=1, n_head=2))
    attention.attach(model, "segment")
    (answer,) = SampleGenerations(Tokenizer, [[5, 6, 7]], Trainer(model), max_new_tokens=40).generate(seed=0)
    assert len(answer) == 3


def test_answers_under_zero3_are_those_of_one_process(tmp_path):
    """There each forward gathers its layers' weights; one process holds them whole."""
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    changed = {
        "eval_strategy": "steps",
        "learning_rate": "1e-5",
        "generation_samples": "3",
        "generation_max_new_tokens": "12",
    }
    for key, value in changed.items():
        overrides[overrides.index(f"--{key}") + 1] = value
    overrides += ["--eval_steps", "1"]
    answers = []
    for zero3 in (False, True):
        folder = tmp_path / f"zero3-{zero3}"
        run("tiny/rmipo", overrides, folder, zero3=zero3)
        answers.append(read_generations(folder))
    alone, sharded = answers
    assert [line["step"] for line in alone] == [1] * 3 + [2] * 3
    assert all(line["answer"] for line in alone) and sharded == alone
