"""Box-Muller of csrc/cuda/device_math.h, at the words where a logarithm in float32 goes wrong first."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCE = """
#include "device_math.h"
using namespace fastvae::cuda;
template <class T> void draw(const uint32_t* w, const uint32_t* angle, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) box_muller(w[i], angle[i], out[2 * i], out[2 * i + 1]);
}
extern "C" void draw_float32(const uint32_t* w, const uint32_t* a, int64_t n, float* out) { draw(w, a, n, out); }
extern "C" void draw_float64(const uint32_t* w, const uint32_t* a, int64_t n, double* out) { draw(w, a, n, out); }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("device_math")
    # math.h and not cmath alone: fma(float, float, float) has to be found without std::
    (folder / "noise.cpp").write_text("#include <math.h>\n" + SOURCE)
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{CUDA}", "noise.cpp", "-o", "noise.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "noise.so"))


def words() -> np.ndarray:
    """Words around 0, 1/4, 1/2, 3/4 and 1, where the logarithm's form changes or u is next to 0 or 1; and others."""
    near = np.arange(-20_000, 20_000)
    around = np.concatenate([near + quarter * 2**30 for quarter in range(5)])
    powers = np.concatenate([2**k + np.arange(-2, 3) for k in range(33)])
    others = np.random.default_rng(0).integers(0, 2**32, 200_000)
    chosen = np.concatenate([around, powers, others])
    return chosen[(chosen >= 0) & (chosen < 2**32)].astype(np.uint32)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-6), (np.float64, 4e-15)])
def test_noise_is_what_the_specification_says(compiled: ctypes.CDLL, dtype: type, limit: float) -> None:
    w = words()
    angle = np.random.default_rng(1).integers(0, 2**32, len(w)).astype(np.uint32)
    got = np.empty((len(w), 2), dtype)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (w, angle))
    draw = getattr(compiled, f"draw_{np.dtype(dtype).name}")
    draw(*pointers, ctypes.c_int64(len(w)), got.ctypes.data_as(ctypes.c_void_p))
    from_zero, from_one = (w + 0.5) / 2**32, (np.float64(2**32 - 1) - w + 0.5) / 2**32
    radius = np.sqrt(-2 * np.where(w < 2**31, np.log(from_zero), np.log1p(-from_one)))
    turn = 2 * np.pi * (angle / 2**32)
    want = radius[:, None] * np.stack((np.cos(turn), np.sin(turn)), 1)
    assert float(np.abs(got - want).max()) < limit
