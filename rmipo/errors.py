"""What all errors that a user can put right have in common."""


class UserError(Exception):
    """The message says what was found, what was expected and what to change: programs print it without a traceback."""


class ConfigError(UserError, ValueError):
    """A wrong choice, recipe or setting: one message with everything that is wrong."""


class CheckpointError(UserError, ValueError):
    """The output folder belongs to another run; the message names what differs."""


class EvaluationError(UserError, ValueError):
    """An evaluation that can't start or was cut short; the message says what to change and what was kept."""


class PairsError(UserError, ValueError):
    """Pairs that can't be made from a model's answers."""
