"""The entry point of the `fastvae` command, outside the package so that it starts before PyTorch is imported.

Importing anything of a package runs the package's own file first. For fastvae that file imports PyTorch, which takes
seconds, and the command line should not need seconds to say that an option is wrong. So `main` makes the package
known without running its file, and `fastvae.app.library` runs it once a command has checked its options.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command line."""
    if "fastvae" not in sys.modules:
        spec = find_spec("fastvae")
        assert spec is not None
        sys.modules["fastvae"] = module_from_spec(spec)
    from fastvae.app.cli import main as run

    run()
