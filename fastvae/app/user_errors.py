"""What a user can put right. The command line prints these errors as a message, without a traceback."""

from __future__ import annotations


class AppError(ValueError):
    """Something the user can put right; the message says what and how."""


class DataError(AppError):
    """A data file is missing, damaged or not what it should be."""


class ConfigError(AppError):
    """An option, or a combination of options, makes no sense."""


class RunError(AppError):
    """A run's folder cannot be used as asked, or training went wrong."""
