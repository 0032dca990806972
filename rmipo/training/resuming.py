"""What transformers' Trainer lacks around checkpoints."""

from transformers import Trainer


class EndsWithItsLastStep(Trainer):
    """transformers' Trainer would train one more step: it looks at the number of steps only after each."""

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin


def gather_at_the_end(trainer: Trainer) -> None:
    """Have FSDP2 gather the model as it is saved once more. Its checkpoints hold each process's share."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
