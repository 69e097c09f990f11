"""The Triton kernels.  They know nothing of the library, which imports them where `impl="triton"` runs them.

The package has one name, `fastvae.kernels`: where it is installed, and in a checkout by the link `fastvae/kernels`.
"""
