"""TRL's trainer of the SFT stage."""

from trl import SFTTrainer

from rmipo.training.resuming import EndsWithItsLastStep


class SupervisedTrainer(EndsWithItsLastStep, SFTTrainer):
    pass
