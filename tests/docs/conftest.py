"""The pages: their code, their links, the notebooks."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # what builds the pages and runs the notebooks does not install there
    collect_ignore_glob = ["test_*.py"]
