"""What can be said of GPU kernels without a GPU: `python -m tools.static_report`.

Every kernel is compiled ahead of time for each architecture; its machine code is read back, and beside it stands a
first-principles floor on an H200 by datasheet.  A family of kernels is one file in `families/`.
"""
