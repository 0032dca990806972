"""Random models without a tokenizer, pairs of random token ids for them, and the preference trainer on both."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.run.callbacks import Recorder
from rmipo.training.trainer import PreferenceTrainer

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "attention_dropout": 0.0,
}  # fmt: skip


def make_model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa", dtype=torch.float32)
    # Embeddings drawn wide, so that attention patterns are far from uniform and a wrong mask shows.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def make_pairs(count, seed=0, prompt_lengths=(1, 9)):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = torch.randint(low, high + 1, (1,), generator=generator).item()
        return torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": tokens(*prompt_lengths), "chosen_ids": tokens(1, 12), "rejected_ids": tokens(1, 12), "row": i}
        for i in range(count)
    ]


CONTEXT = [1, 2]
RMIPO = {"name": "rmipo", "beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6}


def make_trainer(output_dir, pairs, objective=RMIPO, model=None, eval_pairs=None, ref_model=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "global_batch_size": 8, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 1, "logging_steps": 1, "seed": 5,
        "report_to": "none", "bf16": False, "activation_checkpointing": False, **arguments,
    }  # fmt: skip
    args = PreferenceRunConfig(
        output_dir=str(output_dir), objective=objective, use_cpu=True, save_strategy="no", disable_tqdm=True,
        **arguments,
    )  # fmt: skip
    return PreferenceTrainer(
        model or make_model(),
        args,
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(eval_pairs) if eval_pairs else None,
        prior_context=CONTEXT,
        ref_model=ref_model,
        callbacks=[Recorder()],
    )


def recorded_forwards(model):
    """A list that every forward of `model` from here on adds to: positions, gradients on, training mode."""
    forwards = []

    def record(module, args, kwargs):
        forwards.append((kwargs["input_ids"].shape[1], torch.is_grad_enabled(), module.training))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return forwards


def rows_per_step(trainer):
    return [[i for batch in step for i in batch.indices] for step in trainer.get_train_dataloader().batch_sampler]
