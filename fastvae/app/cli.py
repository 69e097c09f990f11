"""The command line: runs a command, and tells what went wrong in a line where the user can put it right."""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn

from fastvae.app.user_errors import AppError

EXTRAS = ("filelock", "matplotlib", "numpy", "pydantic", "pydantic_core", "rich", "scipy", "sklearn", "typer")


def main() -> None:
    """Run the command line; what a user can put right is told on stderr without a traceback."""
    try:
        # Not at the top, so that a missing package can be told in plain words.
        from fastvae.app.commands import app

        app(prog_name="fastvae")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        _fail(f'the command line needs {error.name}, which is not installed; pip install "fastvae-kernels[app]"')
    except AppError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no more could be allocated"
        _fail(f"there is not enough memory ({reason}). Ask for less: smaller sizes or fewer samples.")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(why: str) -> NoReturn:
    rank = os.environ.get("RANK")  # of one of several processes, see run/ranks.py
    sys.exit(f"error: {why}" if rank is None else f"error on rank {rank}: {why}")


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # PyTorch tells by words alone where the CPU's memory does not suffice, or where 64 bits do not for its size.
    told = re.search("allocate|out of memory|storage size calculation|empty_strided", str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or told is not None


if __name__ == "__main__":
    main()
