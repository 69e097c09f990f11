"""Everything that only a GPU can show, by one command: `make gpu`, or `python -m benchmarks.gpu`.

Stages are files in `stages/`; each runs in a process of its own, so that none can take another along when it fails.
Never run on a GPU so far: what was seen to work is the dry run on a machine without one.
"""
