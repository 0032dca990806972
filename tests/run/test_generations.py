"""Sample generations: with the layers' own weights at a time, and nothing of the training set-up changed."""

import json
import types

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerState

from rmipo.files import write_lines
from rmipo.record import GENERATIONS_FILE, read_generations
from rmipo.run import callbacks
from rmipo.run.callbacks import SampleGenerations, StopOnSignal
from rmipo.training import attention
from tests.helpers.small_models import greedy
from tests.helpers.twins import changed, make_twin, run


class Trainer:
    class args:
        device, world_size = torch.device("cpu"), 1

    class callback_handler:
        callbacks = ()

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
        return ids if isinstance(ids, list) else ids.tolist()


def test_answers_are_greedy_and_training_goes_on_as_before(monkeypatch):
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that each token of a prompt counts
    monkeypatch.setattr(callbacks, "positions_of", lambda config: None)  # a model that doesn't say
    model.generation_config.do_sample = True  # as published models say
    model.generation_config.eos_token_id = None
    attention.attach(model, "segment")
    trained_with = model.config._attn_implementation
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    model.train()
    prompts = [[5, 0, 0, 7], [8, 9]]  # the padding token is an ordinary one, too
    answers = SampleGenerations(Tokenizer, prompts, Trainer(model), max_new_tokens=4, stop=StopOnSignal()).generate()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]
    assert model.config._attn_implementation == trained_with != "sdpa"
    attention.attach(model, "plain")
    model.eval()
    assert answers == [greedy(model, prompt, 4) for prompt in prompts]


def test_answers_of_a_step_are_written_once_and_not_at_all_after_a_signal(tmp_path):
    """After a kill, lines of this step and of later ones are there already."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=6, n_embd=32, n_layer=1, n_head=2))
    model.generation_config.eos_token_id = None
    write_lines(tmp_path / GENERATIONS_FILE, [{"step": n, "prompt": "?", "answer": "old"} for n in (2, 4, 4, 6)])
    stop = StopOnSignal()
    samples = SampleGenerations(Tokenizer, [[5, 6, 7]], Trainer(model), max_new_tokens=40, stop=stop)
    arguments = types.SimpleNamespace(output_dir=str(tmp_path), seed=0)
    samples.on_evaluate(arguments, TrainerState(global_step=4, is_world_process_zero=True), None)
    lines = read_generations(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    attention.attach(model.eval(), "plain")  # the model has three more positions
    assert lines[1] == {"step": 4, "prompt": [5, 6, 7], "answer": greedy(model, [5, 6, 7], 3)}
    model.register_forward_hook(lambda *_: setattr(stop, "requested", True))
    assert len(samples.generate()[0]) == 1
    samples.on_evaluate(arguments, TrainerState(global_step=6, is_world_process_zero=True), None)
    assert [line["step"] for line in read_generations(tmp_path)] == [2, 4]


@pytest.mark.slow
def test_answers_under_zero3_are_those_of_one_process(tmp_path):
    """There each forward gathers its layers' weights; one process holds them whole."""
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    more = {"generation_samples": 3, "generation_max_new_tokens": 12}
    overrides = changed(overrides, eval_strategy="steps", eval_steps=1, learning_rate="1e-5", **more)
    answers = []
    for sharding in (None, "zero3"):
        folder = tmp_path / str(sharding)
        run("tiny/rmipo", overrides, folder, sharding)
        answers.append(read_generations(folder))
    alone, sharded = answers
    assert [line["step"] for line in alone] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(line["answer"] for line in alone) and sharded == alone
    held_out = [json.loads(line) for line in (tmp_path / "data/test.jsonl").read_text().splitlines()]
    for line, row in zip(alone[:3], held_out, strict=True):
        assert row["prompt"] in line["prompt"]
