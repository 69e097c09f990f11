"""The Triton kernels.  They know nothing of the library, which imports them where `impl="triton"` runs them.

The package has one name, `fastvae.kernels`: where it is installed, and in a checkout by the link `fastvae/kernels`.

The operators:
    gaussian.py            sampling, log q and the KL in closed form, with their kernels
    mixture.py             the mixture density, its score and its gradients: small problems, or large ones with tiles
    mixture_kl.py          sampling, log q and log p in one launch

Large problems, with tiles:
    mixture_forward.py     the launches for the density and the score
    mixture_parameters.py  the launches for the gradients of the parameters
    mixture_operands.py    what the tiles read, and the launches that pack it
    packing.py             kernels: rows and components, packed
    difference.py          kernels: the exact form of the density, and its gradients
    product.py             kernels: the density as a matrix product, and its gradients
    merge.py               kernels: the parts of splits, merged

Small problems, in one launch each way:
    small.py               what is small, and the launches
    small_forward.py       kernel: sampling, density and score
    small_backward.py      kernel: all gradients

Sizes of tiles:
    tiles.py               the table, and how work is cut
    autotune.py            the choice by time, with FASTVAE_AUTOTUNE=1
    tuned_tiles.py         the file of such choices

Functions that kernels share:
    skipping.py            which pairs of a row and a component are left out
    logsumexp.py           the online logsumexp, responsibilities and their sums
    components.py          how components are read
    noise.py               the random numbers of a seed
    arithmetic.py          exp and log, compensated sums, rounding to TF32

    launch.py              what every launch needs: the current device, and whether Triton interprets
"""
