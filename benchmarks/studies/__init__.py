"""Experiments with a record of their own: what the bounds and the priors cost and gain.

`python -m fastvae.benchmarks.studies NAME`; each study is a module with `study`, which returns what the record keeps.
"""
