"""What transformers' Trainer lacks around checkpoints."""

import json
from pathlib import Path

from peft import PeftModel
from transformers import Trainer

from rmipo.errors import ConfigError
from rmipo.fingerprints import rows_fingerprint

SAMPLED_ROWS = 256  # of the training data, by which a resumed run knows it again
# Arguments that the Trainer would take from the checkpoint, or half from it, without a word.
ARGUMENTS = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "optim")
ARGUMENTS += ("weight_decay", "adam_beta1", "adam_beta2")
STARTED = "started"  # the first file of a checkpoint: a folder without it is somebody else's, whatever its name


def start_checkpoint(output_dir: str | Path, step: int) -> None:
    folder = Path(output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).touch()


class EndsWithItsLastStep(Trainer):
    """From a checkpoint of the last step the Trainer would train one more: it looks at their number only after each."""

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        if self.state.global_step > max_steps:  # its weights would pass for those of a shorter training
            steps = f"{self.state.global_step}, beyond the {max_steps} steps of this training"
            raise ConfigError(f"the checkpoint is of step {steps}: raise max_steps or num_train_epochs")
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _save_checkpoint(self, model, trial) -> None:
        if self.is_world_process_zero():
            start_checkpoint(self.args.output_dir, self.state.global_step)
        super()._save_checkpoint(model, trial)


def decisive(trainer: Trainer) -> dict:
    """What a resumed preference training must have in common with the one that saved its checkpoint, in plain values."""
    rows = trainer.train_dataset.tokenized
    some = rows.select(range(0, len(rows), -(-len(rows) // SAMPLED_ROWS)))  # all of a large dataset: minutes
    objective = vars(trainer.objective) | {"name": trainer.objective.name}
    values = {"objective": objective, "pairs": f"{len(rows)}, fingerprint {rows_fingerprint(some)}"}
    if trainer.named:
        values["initial model"] = trainer.reference.model_key
    if isinstance(trainer.model, PeftModel):  # an adapter of one base is another one on another
        adapter = trainer.model.active_peft_config
        values["base model"] = trainer.model.get_base_model().config._name_or_path
        values |= {f"adapter's {key}": getattr(adapter, key, None) for key in ("r", "lora_alpha")}
    values |= {name: getattr(trainer.args, name) for name in ARGUMENTS}
    return json.loads(json.dumps(values | {"global_batch_size": trainer.global_batch_size}))


def gather_at_the_end(trainer: Trainer) -> None:
    """Have FSDP2 gather the model as it is saved once more. Its checkpoints hold each process's share."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
