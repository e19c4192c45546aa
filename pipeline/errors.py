"""Errors that a person can mend: the message says what was wrong, where, and what is allowed."""


class StageError(RuntimeError):
    """A stage cannot go on."""


class DataError(ValueError):
    """A data set that cannot be used; the message names the file or class."""


class ParamsError(ValueError):
    """A file of parameters says something that is not allowed."""


class DivergenceError(ValueError):
    """The loss or a gradient is not a finite number."""
