"""The preference trainer on small models and random pairs."""

import torch
from datasets import Dataset

from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.run.callbacks import Recorder
from rmipo.training.trainer import PreferenceTrainer
from tests.helpers.small_models import make_model

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
        model or make_model("llama"),
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
