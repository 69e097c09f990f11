"""Everything that only a GPU can show, by one command: `make gpu`, or `python -m tools.gpu`.

`stages.py` lists the stages; each runs in a process of its own, so that none can take another along when it fails.
"""
