"""The entry point of the `fastvae` command."""

from __future__ import annotations

import sys

from fastvae.app.user_errors import AppError

EXTRAS = ("typer", "rich", "numpy", "sklearn", "scipy", "matplotlib")


def main() -> None:
    """Run the command line; what a user can put right is told on stderr without a traceback."""
    try:
        # Not at the top, so that a missing package can be told in plain words.
        from fastvae.app.commands import app

        app(prog_name="fastvae")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        sys.exit(f'error: the command line needs {error.name}, which is not installed; pip install "fastvae[app]"')
    except (AppError, PermissionError, NotADirectoryError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
