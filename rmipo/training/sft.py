"""TRL's trainer of the SFT stage."""

from trl import SFTTrainer

from rmipo.training.checkpoints import EndsWithItsLastStep
from rmipo.training.loading import require_masters


class SupervisedTrainer(EndsWithItsLastStep, SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require_masters(self.model, self.accelerator)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL writes one with each checkpoint, and the run writes its own at its end."""
