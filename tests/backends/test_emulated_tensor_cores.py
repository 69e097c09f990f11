"""The emulated tensor cores: where elements go, how sums and fp16 numbers round, and what is refused.

Kernels of tests/emulation/tensor_cores.cpp show it.  tests/emulation/emulated_tensor_cores.h says what is emulated.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from emulation.library import CSRC, HERE, library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

PITCH = 128  # bytes from a row to the next


@pytest.fixture(scope="module")
def built() -> Path:
    return library("tensor_cores", [HERE / "tensor_cores.cpp"], [HERE, CSRC / "cuda"], ["-U_FORTIFY_SOURCE"])


@pytest.fixture
def kernels(built: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(built))


@pytest.fixture(params=["truncating", "exact"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTVAE_EMULATION_SUMS", request.param)
    return str(request.param)


def at(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)  # which keeps the array


def product(kernels: ctypes.CDLL, a: Halves, b: Halves, old: Floats) -> Floats:
    """old + a b, by a chain of multiply_add."""
    new = old.copy()
    kernels.run_product(at(a), at(b), a.shape[1] // 16, at(new))
    return new


def matrices(n: int, seed: int, spread: float = 0.0, middle: float = 0.0) -> tuple[Halves, Halves, Floats]:
    """a [16, 16 n], b [16 n, 8] and an old sum [16, 8], of sizes 2^(middle - spread) to 2^(middle + spread)."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> npt.NDArray[np.float64]:
        return random.standard_normal(shape) * 2.0 ** random.uniform(middle - spread, middle + spread, shape)

    return (
        normal(16, 16 * n).astype(np.float16),
        normal(16 * n, 8).astype(np.float16),
        normal(16, 8).astype(np.float32),
    )


def rounded(value: Fraction) -> np.float32:
    """To the nearest, ties to even."""
    near = np.float32(float(value))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - value), x.view(np.uint32) % 2))


# Products.


def test_elements_are_where_the_header_says(kernels: ctypes.CDLL, sums: str) -> None:
    """Each of its own: small whole numbers, whose sums no rounding changes."""
    random = np.random.default_rng(1)
    a, b, old = (random.integers(-50, 50, shape).astype(float) for shape in ((16, 48), (48, 8), (16, 8)))
    new = product(kernels, a.astype(np.float16), b.astype(np.float16), old.astype(np.float32))
    np.testing.assert_array_equal(new, old + a @ b)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_a_kernel_multiplies(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, sums: str, order: str) -> None:
    """Of several warps, from shared memory, in long chains: lanes are ahead of others in any order."""
    monkeypatch.setenv("FASTVAE_EMULATION_ORDER", order)
    kernels.matrix_bank_conflicts.restype = ctypes.c_int64
    before = kernels.matrix_bank_conflicts()
    random = np.random.default_rng(9)
    a, b = random.integers(-9, 9, (48, 64)).astype(float), random.integers(-9, 9, (64, 16)).astype(float)
    new = np.zeros((48, 16), np.float32)
    kernels.run_shared_product(at(a.astype(np.float16)), at(b.astype(np.float16)), at(new))
    np.testing.assert_array_equal(new, a @ b)
    assert kernels.matrix_bank_conflicts() - before == 3 * 4 * 4 * 1  # of b, whose rows have 32 bytes: see the kernel


@pytest.mark.parametrize("spread", [0, 6])
def test_exact_sums_round_once(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    monkeypatch.setenv("FASTVAE_EMULATION_SUMS", "exact")
    a, b, old = matrices(1, seed=2, spread=spread)
    new = product(kernels, a, b, old)
    for i, j in np.ndindex(16, 8):
        terms = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[i], b[:, j], strict=True)]
        assert new[i, j] == rounded(Fraction(float(old[i, j])) + sum(terms))


def exponent(value: float) -> int:
    return math.frexp(value)[1] - 1


def cut_off(value: Fraction, last: int) -> Fraction:
    """Towards zero, to multiples of 2^last."""
    unit = Fraction(2) ** last
    return math.trunc(value / unit) * unit


def cut_off_twice(a: Halves, b: Halves, old: np.float32) -> Fraction:
    """What the header says of truncating sums, by the letter."""
    total = Fraction(float(old))
    for begin in range(0, len(a), 8):
        factors = [(float(x), float(y)) for x, y in zip(a[begin : begin + 8], b[begin : begin + 8], strict=True)]
        sizes = [max(abs(x), 2.0**-14) * max(abs(y), 2.0**-14) for x, y in factors if x * y]
        last = max(map(exponent, [*sizes, float(total)] if total else sizes), default=0) - 23
        total = sum((cut_off(Fraction(x) * Fraction(y), last) for x, y in factors), cut_off(total, last))
        total = cut_off(total, exponent(float(total)) - 23)
    return total


@pytest.mark.parametrize("spread, middle", [(0, 0), (4, 0), (12, 0), (0, -15), (8, -12)])
@pytest.mark.parametrize("n", [1, 5])
def test_truncating_sums_are_the_stated_ones(
    kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, n: int, spread: float, middle: float
) -> None:
    """Also of subnormal numbers, which are below 2^-14."""
    monkeypatch.delenv("FASTVAE_EMULATION_SUMS", raising=False)  # it is the default
    a, b, old = matrices(n, 3, spread, middle)
    old[:, ::2] = 0
    new = product(kernels, a, b, old)
    for i, j in np.ndindex(16, 8):
        assert Fraction(float(new[i, j])) == cut_off_twice(a[i], b[:, j], old[i, j])


def test_truncating_sums_are_cut_off_towards_zero(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of positive terms, each addition of 8 loses less than 9 + 1 units of the result's last place."""
    monkeypatch.setenv("FASTVAE_EMULATION_SUMS", "truncating")
    n = 8
    a, b, old = (np.abs(x) for x in matrices(n, seed=4))
    new = product(kernels, a, b, old)
    lost = (old + a.astype(float) @ b.astype(float) - new) / np.spacing(new)
    assert (lost >= 0).all() and (lost < 2 * n * 10).all() and (lost > 2).any()
    np.testing.assert_array_equal(product(kernels, -a, b, -old), -new)


def test_subnormal_numbers_count(kernels: ctypes.CDLL, sums: str) -> None:
    a, b, old = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16), np.zeros((16, 8), np.float32)
    a[3, 5], b[5, 2] = 2.0**-24, -3 * 2.0**-24
    a[4, 6], b[6, 2] = 2.0**-24, 2.0**15
    old[7, 7] = 1e-40
    new = product(kernels, a, b, old)
    assert new[3, 2] == -3 * 2.0**-48 and new[4, 2] == 2.0**-9 and new[7, 7] == np.float32(1e-40)
    assert np.count_nonzero(new) == 3


def test_infinity_and_nan_propagate(kernels: ctypes.CDLL, sums: str) -> None:
    a, b, old = np.ones((16, 16), np.float16), np.ones((16, 8), np.float16), np.zeros((16, 8), np.float32)
    a[0, 3], a[1, 12] = np.inf, -np.inf
    a[2, 4], a[2, 5] = np.inf, -np.inf
    a[3, 9] = np.nan
    a[4, 15], b[15, 6] = np.inf, 0
    old[5], old[6] = np.nan, -np.inf
    new = product(kernels, a, b, old)
    assert (new[0] == np.inf).all() and (new[1] == -np.inf).all() and (new[6] == -np.inf).all()
    assert np.isnan(new[[2, 3, 5]]).all() and np.isnan(new[4, 6]) and (new[4, :6] == np.inf).all()
    np.testing.assert_array_equal(new[7:], np.broadcast_to([16] * 6 + [15, 16], (9, 8)))


def test_sums_are_one_of_two(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_EMULATION_SUMS", "rounded")
    assert "sums are truncating or exact" in dies(built, "run_meet_at_different_operations()")


# Loads.


def load(kernels: ctypes.CDLL, memory: Array, offsets: list[int], transposed: bool) -> npt.NDArray[np.uint16]:
    """What each lane gets: [32, 4, 2]."""
    out = np.zeros((32, 4, 2), np.uint16)
    places = np.array(offsets, np.int32)
    kernels.run_load(at(memory), memory.nbytes, at(places), int(transposed), at(out))
    return out


@pytest.mark.parametrize("transposed", [False, True])
def test_loaded_elements_are_where_the_header_says(kernels: ctypes.CDLL, transposed: bool) -> None:
    memory = np.random.default_rng(5).permutation(64 * 64).astype(np.uint16)
    offsets = [16 * int(unit) for unit in np.random.default_rng(6).permutation(memory.nbytes // 16)[:32]]
    out = load(kernels, memory, offsets, transposed)
    for lane in range(32):
        for i in range(4):
            matrix = [memory[offset // 2 : offset // 2 + 8] for offset in offsets[8 * i : 8 * i + 8]]
            row, pair = lane // 4, lane % 4 * 2
            want = [matrix[pair + e][row] if transposed else matrix[row][pair + e] for e in range(2)]
            assert out[lane, i].tolist() == want


@pytest.mark.parametrize("transposed", [False, True])
def test_bank_conflicts_are_counted(kernels: ctypes.CDLL, transposed: bool) -> None:
    """Of each matrix, times of reading beyond the first."""
    kernels.matrix_bank_conflicts.restype = ctypes.c_int64
    memory = np.zeros(32 * PITCH, np.uint8)

    def counted(offset: Callable[[int], int]) -> int:
        before: int = kernels.matrix_bank_conflicts()
        load(kernels, memory, [offset(row) for row in range(32)], transposed)
        return int(kernels.matrix_bank_conflicts()) - before

    for unit in range(PITCH // 16):
        assert counted(lambda row, unit=unit: row * PITCH + unit * 16) == 4 * 7
        assert counted(lambda row, unit=unit: row * PITCH + (unit ^ (row & 7)) * 16) == 0
    assert counted(lambda row: row * 16) == 0  # without gaps
    assert counted(lambda row: row * (64 + 16)) == 0
    assert counted(lambda row: row * 64) == 4 * 3
    assert counted(lambda row: row // 2 * PITCH) == 4 * 3  # a row that two lanes name is read once
    assert counted(lambda row: 0) == 0


# What a device would not do either.


def dies(built: Path, call: str) -> str:
    """The last words of a process that makes the call."""
    libraries = "import ctypes, numpy as np, torch"  # torch loads what the library needs
    code = f"{libraries}\nkernels = ctypes.CDLL({str(built)!r})\nkernels.{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "offset, told",
    [
        (8, "a matrix's row is misaligned"),
        (-16, "a matrix's row lies outside shared memory"),
        (1024 - 8, "a matrix's row lies outside shared memory"),
        (1024, "a matrix's row lies outside shared memory"),
    ],
)
def test_a_wrong_row_is_refused(built: Path, offset: int, told: str) -> None:
    call = (
        "run_load(bytes(1024), 1024, np.array([0] * 21 + [{}] + [0] * 10, np.int32).ctypes.data_as(ctypes.c_void_p),"
        " 0, np.zeros(128, np.int32).ctypes.data_as(ctypes.c_void_p))"
    )
    assert told in dies(built, call.format(offset))


def test_lanes_must_meet_at_one_operation(built: Path) -> None:
    assert "lanes of a warp met at different operations" in dies(built, "run_meet_at_different_operations()")


# Conversions.


def to_half(kernels: ctypes.CDLL, x: Floats) -> Halves:
    out = np.zeros(x.shape, np.float16)
    kernels.to_half(at(x), x.size, at(out))
    return out


def assert_same_numbers(got: Array, want: Array) -> None:
    """Signs of zeros as well, but not of NaN."""
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)]))


def test_every_half_is_converted(kernels: ctypes.CDLL) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    floats = np.zeros(halves.shape, np.float32)
    kernels.to_float(at(halves), halves.size, at(floats))
    assert_same_numbers(floats, halves.astype(np.float32))
    assert_same_numbers(to_half(kernels, floats), halves)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_floats_become_the_nearest_half(kernels: ctypes.CDLL) -> None:
    """Also ties, which become even, and their neighbours, and what is subnormal or too large."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = np.append((halves[:-1] + halves[1:]) / 2, np.float32(65520))
    random = np.random.default_rng(7).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    around = [np.nextafter(ties, np.float32(to)) for to in (0, np.inf)]
    large = np.array([65504, 65536, 1e30, np.inf, np.nan, 0, 1e-45], np.float32)
    usual = np.random.default_rng(8).standard_normal(1 << 18).astype(np.float32)
    small = usual * np.float32(2.0**-15)
    x = np.concatenate([ties, *around, random, large, usual, small])
    for signed in (x, -x):
        assert_same_numbers(to_half(kernels, signed), signed.astype(np.float16))


# Other operations of a warp.


@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
def test_lanes_exchange(kernels: ctypes.CDLL, by: int) -> None:
    values = np.random.default_rng(by).permutation(32).astype(np.int32)
    out = np.zeros((7, 32), np.int32)
    kernels.run_exchanges(at(values), by, at(out))
    lanes = np.arange(32)
    votes = values > by
    want = [
        values[np.full(32, by)],
        values[np.where(lanes < by, lanes, lanes - by)],
        values[np.where(lanes + by < 32, lanes + by, lanes)],
        values[lanes ^ by],
        np.full(32, votes.any()),
        np.full(32, votes.all()),
        np.full(32, np.packbits(votes, bitorder="little").view(np.int32)[0]),
    ]
    np.testing.assert_array_equal(out, np.stack(want))


def test_a_thread_has_the_rest(kernels: ctypes.CDLL) -> None:
    """Atomic operations, the bits of numbers, and memory past the caches."""
    values = np.random.default_rng(10).integers(-(1 << 31), 1 << 31, 64).astype(np.int32)
    combined, of_each = np.full(3, -1, np.int32), np.zeros((4, 64), np.int32)
    kernels.run_rest(at(values), at(combined), at(of_each))
    assert combined[0] == values.sum(dtype=np.int32)  # which wraps
    assert combined[1] == max(0, values.max()) and combined[2] == np.bitwise_or.reduce(values)
    ones = np.unpackbits(values.view(np.uint8)).reshape(64, 32).sum(1)
    first = [(int(value) & -int(value)).bit_length() for value in values]
    np.testing.assert_array_equal(of_each, np.stack([ones, first, values, values]))
