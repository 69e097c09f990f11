"""Builds the compiled kernels; everything else is in pyproject.toml.

FASTVAE_NO_EXTENSION=1 installs without them: the composite backend then does the work.
"""

import os
from glob import glob

from setuptools import setup

sources = sorted(glob("csrc/cpu/*.cpp"))
options: dict = {}
if os.environ.get("FASTVAE_NO_EXTENSION") != "1":
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    options = {
        "ext_modules": [
            CppExtension(
                "fastvae._C",
                sources,
                # 2.10, the first torch that has all of the stable ABI that is used: one file serves it and later ones
                define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
                extra_compile_args=[
                    "-O3",
                    "-g0",
                    "-std=c++17",
                    "-Wall",
                    "-Wextra",
                    "-Wno-psabi",
                    "-Wno-unknown-pragmas",
                ],
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

setup(**options)
