"""The errors that the command line shows as one sentence."""


class InputError(ValueError):
    """What the caller gave cannot be used; the message says what was given, what is expected, what to do."""


class TrainingDivergedError(FloatingPointError):
    """The loss became NaN or infinite; the message says at which step."""
