"""Builds the compiled kernels, `fastvae._C`; everything else is in pyproject.toml.

Environment variables decide what is built:

FASTVAE_NO_EXTENSION=1  nothing: the wheel is pure Python, and the composite backend does the work.
FASTVAE_CUDA=0|1        without the CUDA kernels, or with them, else the build fails.  By default they are built where
                        nvcc is found, on the PATH or under CUDA_HOME, whether or not there is a GPU.
MAX_JOBS=n              at most n files are compiled at once; by default one for each processor.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup


def switch(name: str) -> bool | None:
    """Whether an environment variable is 1 or 0; None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise RuntimeError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1" if value else None


def sources(*patterns: str) -> list[str]:
    """Files under csrc/, in an order that is the same everywhere."""
    return sorted(file for pattern in patterns for file in glob(f"csrc/{pattern}", recursive=True))


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit; None where the extension is to be built without CUDA.

    Raises:
        RuntimeError: FASTVAE_CUDA=1 asks for CUDA and there is no nvcc.
    """
    wanted = switch("FASTVAE_CUDA")
    if wanted is False:
        return None
    folder = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for nvcc in (os.path.join(folder, "bin", "nvcc"), shutil.which("nvcc")):
        if nvcc and os.path.exists(nvcc):
            # nvcc on the PATH may be a script that calls the real one: it knows where that is
            told = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True)
            top = [line.split("=", 1)[1] for line in told.stderr.splitlines() if line.startswith("#$ TOP=")]
            if top:
                return Path(top[0].strip()).resolve()
    if wanted:
        raise RuntimeError("FASTVAE_CUDA=1, but no nvcc: put it on the PATH or set CUDA_HOME to the toolkit's folder")
    return None


def extension() -> dict:
    """What setup() needs to build fastvae._C.

    Raises:
        RuntimeError: the machine or its torch cannot build it.
    """
    if os.name != "posix":
        raise RuntimeError("the compiled kernels need GCC or Clang: set FASTVAE_NO_EXTENSION=1 to install without them")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise RuntimeError("install torch 2.10 or newer before fastvae, or leave out --no-build-isolation") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise RuntimeError(f"the compiled kernels need torch 2.10 or newer; this is torch {torch.__version__}")

    cuda = cuda_home()

    class Build(BuildExtension):
        """Compiles the CUDA kernels first: PyTorch's own way needs a PyTorch that was built with CUDA."""

        def build_extension(self, extension) -> None:
            if cuda:
                with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                    extension.extra_objects += pool.map(self.compile_kernels, sources("cuda/**/*.cu"))
            super().build_extension(extension)

        def compile_kernels(self, source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            nvcc = str(cuda / "bin/nvcc")
            known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
            flags = Path("csrc/cuda/nvcc.txt").read_text().split()
            # an older nvcc leaves out the devices that came after it; sm_90a is listed as sm_90
            flags = [f for f in flags if ",code=sm_" not in f or f.split(",code=")[1].rstrip("a") in known]
            subprocess.run([nvcc, *flags, "-c", source, "-o", str(target)], check=True)
            return str(target)

    module = CppExtension(
        "fastvae._C",
        sources("common/**/*.cpp", "cpu/**/*.cpp", *["cuda/**/*.cpp"] * bool(cuda)),
        include_dirs=[str(cuda / "include")] if cuda else [],
        # 2.10, the first torch that has all of the stable ABI that is used: one file serves it and later ones
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"],
        # The CUDA runtime comes along, so that the file loads where there is none; hidden, so that it is not
        # taken for PyTorch's.  The driver is looked for at the first launch.
        library_dirs=[str(cuda / "lib64"), str(cuda / "lib")] if cuda else [],
        libraries=["cudart_static", "dl", "rt", "pthread"] if cuda else [],
        extra_link_args=["-Wl,--exclude-libs,ALL"] if cuda else [],
        depends=sources("**/*.*"),
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if switch("FASTVAE_NO_EXTENSION") else extension()))
