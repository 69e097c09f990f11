"""What a checkout is worked on with, and what is not installed; run from the checkout's root by `python -m tools.NAME`.

static_report  what the compilers make of the GPU kernels, without a GPU
gpu            build, test and measure on a GPU: `make gpu`
tables         tables from records, put into README.md and docs/
figures        figures of a record of `fastvae bench`
experiments    questions that were asked once, and can be asked again
"""
