"""Going on from a checkpoint of the last step: nothing is left to train."""

from transformers import Trainer


class EndsWithItsLastStep(Trainer):
    """transformers' Trainer would train one more step: it looks at the number of steps only after each."""

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *rest):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *rest)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin
