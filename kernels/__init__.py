"""The Triton kernels' place, installed as `fastvae.kernels`; this version has none."""
