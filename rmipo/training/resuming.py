"""What transformers' Trainer lacks around checkpoints."""

from pathlib import Path

from transformers import Trainer

from rmipo.errors import ConfigError

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


def gather_at_the_end(trainer: Trainer) -> None:
    """Have FSDP2 gather the model as it is saved once more. Its checkpoints hold each process's share."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
