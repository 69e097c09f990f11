"""The Triton kernels, installed as `fastvae.kernels`: imported only where `impl="triton"` runs them.

Where they can run is told by `fastvae.info()`; docs/triton-kernels.md says how they work.
"""
