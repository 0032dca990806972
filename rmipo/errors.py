"""What all errors that a user can put right have in common."""


class UserError(Exception):
    """The message says what was found, what was expected and what to change: programs print it without a traceback."""
