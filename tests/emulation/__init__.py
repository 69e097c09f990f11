"""Kernels' own source, compiled for a machine that cannot run them and registered as operators of their own.

`cuda`: the CUDA kernels on a CPU.  `avx512`: the AVX-512 kernels on a CPU without AVX-512.
"""
