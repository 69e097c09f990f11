"""The version, alone so that whatever needs it can have it without the library."""

__version__ = "0.1.0"
