"""Errors that a user can act on.

Every message says what was given and what is needed; `hint` names the setting to change. The command prints both and
exits with `exit_code`, without a traceback. An exception that is not a `StropError` is a bug of ours and keeps its own.
Each class also derives from the built-in error that plain Python code would expect in its place.
"""

from __future__ import annotations


class StropError(Exception):
    """Base of all errors meant for a user. `hint` says which setting to change; it may be empty."""

    exit_code = 2
    """Of the command: 2, or 1 where a run was ended on purpose."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(StropError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(StropError, ValueError):
    """A data set is empty, lacks a column or holds a row that cannot be used."""


class ModelError(StropError, ValueError):
    """A model folder is incomplete, or its architecture cannot be trained."""


class RewardError(StropError, RuntimeError):
    """A reward function cannot be loaded or breaks its contract (number or type of returned values)."""


class EngineError(StropError, RuntimeError):
    """The generation engine cannot be built, or did not do what was asked of it."""


class PlanError(StropError, ValueError):
    """The run does not fit the machine it is planned for."""


class RunError(StropError, RuntimeError):
    """A run folder cannot be used: locked, of another config, or unreadable."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read back."""


class DiagnosisError(StropError, RuntimeError):
    """A monitor found what the user chose to stop for; a checkpoint is written."""

    exit_code = 1


class DivergenceError(StropError, ArithmeticError):
    """Losses or gradients were not finite several steps in a row."""


class MemoryExhaustedError(StropError, MemoryError):
    """Training needs more memory than there is, in however small pieces."""
