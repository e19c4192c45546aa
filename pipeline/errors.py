"""Errors that a person can mend: the message says what was wrong, where, and what is allowed."""

from stdb import DataError

__all__ = ["DataError", "DivergenceError", "ParamsError", "StageError"]


class StageError(RuntimeError):
    """A stage cannot go on."""


class ParamsError(ValueError):
    """A file of parameters says something that is not allowed."""


class DivergenceError(ValueError):
    """The loss or a gradient is not a finite number."""
