"""Rows and components in blocks, from files, give what the call in memory gives; and what is read is what is told."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from budget import Case, Result, allowance, assert_within, diffuse_case, hard_case, run
from support.patience import PATIENCE
from torch import Tensor

import fastvae
from fastvae import streaming
from fastvae.streaming import Blocks, Merged, StreamedScores, streamed_log_prob


class Counted:
    """Rows whose reading is counted, and takes a while."""

    def __init__(self, value: Tensor, seconds: float = 0.0) -> None:
        self.value, self.seconds, self.shape = value.numpy(), seconds, tuple(value.shape)
        self.bytes, self.threads = 0, set[str]()

    def __getitem__(self, rows: slice) -> np.ndarray:
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        block = self.value[rows]
        self.bytes += block.nbytes
        return block


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Have blocks of so many rows and components."""

    def set_blocks(rows: int, components: int) -> None:
        def blocks(M: int, K: int, D: int, **_: Any) -> Blocks:
            return Blocks(max(1, min(M, rows)), min(K, components))

        monkeypatch.setattr(streaming, "blocks", blocks)

    return set_blocks


def streamed(case: Case, **more: Any) -> Result:
    """log_prob and the gradient that it gives z, as `budget.run` has them; nothing for the parameters."""
    log_prob, score = streamed_log_prob(
        case.z, case.mu, case.logvar, case.log_weights, exclude=case.exclude, score=True, **more
    )
    return Result(log_prob, score * case.grad[:, None], *[case.z.new_empty(0)] * 3)


def forward_alone(result: Result) -> Result:
    return Result(result.log_prob, result.dz, *[result.dz.new_empty(0)] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "components"), [(64, 200), (64, 7), (5, 200), (5, 64), (1, 1)])
def test_blocks_are_within_the_error_budget_of_the_call_in_memory(
    cut: Callable[[int, int], None], dtype: torch.dtype, rows: int, components: int
) -> None:
    case = hard_case(33, 130, 9, dtype=dtype)
    want, allowed = map(forward_alone, allowance(case))
    cut(rows, components)
    assert_within(streamed(case), want, allowed)


def test_many_blocks_lose_nothing_beside_the_kernels(cut: Callable[[int, int], None]) -> None:
    """A thousand merges of nearly equal parts: a merge in float32 would lose 1e-5 nats and more."""
    case = diffuse_case(16, 1000, 4)
    want, allowed = map(forward_alone, allowance(case))
    cut(16, 1)
    assert_within(streamed(case), want, allowed)
    far = case.z + 100.0  # |log p| is 1e4: logaddexp in float32 would lose 1e-3 each time
    got = streamed_log_prob(far, case.mu, case.logvar)
    exact = fastvae.reference.mixture_log_prob(far.double(), case.mu.double(), case.logvar.double())
    one = fastvae.mixture_log_prob(far, case.mu, case.logvar).double()
    assert (got - exact).abs().max() <= 2 * (one - exact).abs().max() + 2.0**-24 * exact.abs().max()


def test_one_block_of_components_gives_the_bits_of_the_call_in_memory(cut: Callable[[int, int], None]) -> None:
    case = hard_case(40, 70, 6)
    cut(40, 70)
    log_prob, score = streamed_log_prob(case.z, case.mu, case.logvar, case.log_weights, score=True)
    want = fastvae.mixture_log_prob_and_score(case.z, case.mu, case.logvar, case.log_weights)
    assert torch.equal(log_prob, want[0]) and torch.equal(score, want[1])


def test_the_same_blocks_give_the_same_bits_however_slow_the_reading(cut: Callable[[int, int], None]) -> None:
    case = hard_case(30, 60, 5)
    cut(11, 13)
    first = streamed(case)
    slow = streamed_log_prob(
        Counted(case.z, 0.003), Counted(case.mu), Counted(case.logvar, 0.001), Counted(case.log_weights)
    )
    assert torch.equal(first.log_prob, slow)


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (60, 1), (60, 5)])
@pytest.mark.parametrize("components", [60, 7])
def test_every_shape_of_logvar(cut: Callable[[int, int], None], shape: tuple[int, ...], components: int) -> None:
    z, mu, logvar = torch.randn(20, 5), torch.randn(60, 5), 0.3 * torch.randn(shape)
    cut(9, components)
    got = streamed_log_prob(z, mu.numpy(), logvar.numpy())
    assert torch.allclose(got, fastvae.reference.mixture_log_prob(z, mu, logvar), rtol=1e-5, atol=1e-5)


def test_exclude_names_components_by_their_number_in_the_whole_mixture(cut: Callable[[int, int], None]) -> None:
    z, mu, logvar = torch.randn(20, 3), torch.randn(30, 3), torch.randn(30, 3)
    exclude = torch.arange(20) - 1
    cut(6, 7)
    got = streamed_log_prob(z, mu, logvar, exclude=exclude)
    assert torch.allclose(got, fastvae.reference.mixture_log_prob(z, mu, logvar, exclude=exclude), atol=1e-5)
    with pytest.raises(ValueError, match=r"exclude must be in -1 \.\.\. 29 for K = 30"):
        streamed_log_prob(z, mu, logvar, exclude=exclude + 15)
    with pytest.raises(ValueError, match="exclude must be"):
        streamed_log_prob(z, mu, logvar, exclude=exclude[1:])
    with pytest.raises(TypeError, match="exclude must be an int64 tensor"):
        streamed_log_prob(z, mu, logvar, exclude=exclude.int())


def test_weights_of_zero_and_rows_with_nan(cut: Callable[[int, int], None]) -> None:
    z, mu, logvar = torch.randn(6, 3), torch.randn(8, 3), torch.randn(8, 3)
    z[2, 1] = math.nan
    cut(4, 3)
    log_weights = torch.full((8,), -math.inf)
    log_prob, score = streamed_log_prob(z, mu, logvar, log_weights, score=True)
    others = torch.arange(6) != 2
    assert (log_prob[others] == -math.inf).all() and (score[others] == 0).all() and log_prob[2].isnan()
    log_weights[4] = -1.0  # the first and the last block have nothing
    log_prob, score = streamed_log_prob(z, mu, logvar, log_weights, score=True)
    want, want_score = fastvae.mixture_log_prob_and_score(z, mu, logvar, log_weights)
    assert torch.equal(log_prob[others], want[others]) and torch.equal(score[others], want_score[others])
    assert log_prob[2].isnan() and score[2].isnan().any()
    log_weights[5] = math.inf
    assert torch.equal(
        streamed_log_prob(z, mu, logvar, log_weights).isfinite(),
        fastvae.reference.mixture_log_prob(z, mu, logvar, log_weights).isfinite(),
    )


@pytest.mark.parametrize(("M", "K", "D"), [(0, 3, 2), (1, 1, 1), (1, 5, 1), (5, 1, 3)])
def test_smallest_sizes(cut: Callable[[int, int], None], M: int, K: int, D: int) -> None:
    z, mu, logvar = torch.randn(M, D), torch.randn(K, D), torch.randn(K, D)
    for sizes in ((10, 10), (1, 1)):
        cut(*sizes)
        log_prob, score = streamed_log_prob(z, mu, logvar, score=True)
        want, want_score = fastvae.mixture_log_prob_and_score(z, mu, logvar)
        assert log_prob.shape == (M,) and score.shape == (M, D)
        assert torch.allclose(log_prob, want, atol=1e-5) and torch.allclose(score, want_score, atol=1e-4)


def test_files_of_numpy_and_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    z, mu, logvar = torch.randn(50, 4), torch.randn(40, 4), torch.randn(40, 4)
    log_weights = torch.randn(40)
    want = fastvae.mixture_log_prob(z, mu, logvar, log_weights)
    np.save(tmp_path / "z.npy", z.numpy())
    save_file({"mu": mu, "logvar": logvar, "log_weights": log_weights}, tmp_path / "mixture.safetensors")
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    with safetensors.safe_open(tmp_path / "mixture.safetensors", framework="pt") as file:
        mixture = [file.get_slice(name) for name in ("mu", "logvar", "log_weights")]
        got = streamed_log_prob(mapped, *mixture, memory=3000)
        assert StreamedScores(mapped, *mixture, memory=3000).blocks.components < 40
    assert torch.allclose(got, want, atol=1e-5)
    save_file({"mu": mu.bfloat16(), "logvar": logvar.half()}, tmp_path / "halves.safetensors")
    with safetensors.safe_open(tmp_path / "halves.safetensors", framework="pt") as file:
        got = streamed_log_prob(mapped, file.get_slice("mu"), file.get_slice("logvar"))
    assert torch.equal(got, fastvae.mixture_log_prob(z, mu.bfloat16(), logvar.half()))


def test_arrays_of_zarr(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    z, mu, logvar = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) for rows in (50, 70, 70))
    for name, value in {"z": z, "mu": mu, "logvar": logvar}.items():
        zarr.save(str(tmp_path / name), value.numpy())
    stored = (zarr.open(str(tmp_path / name), mode="r") for name in ("z", "mu", "logvar"))
    assert torch.equal(fastvae.streamed_log_prob(*stored), fastvae.mixture_log_prob(z, mu, logvar))


def test_a_wider_dtype_is_computed_with_and_returned() -> None:
    z, mu, logvar = torch.randn(9, 4), torch.randn(7, 4), torch.randn(7, 4)
    got = streamed_log_prob(z, mu, logvar, dtype=torch.float64)
    assert got.dtype == torch.float64
    assert torch.equal(got, fastvae.mixture_log_prob(z.double(), mu.double(), logvar.double()))
    assert streamed_log_prob(z.half(), mu, logvar).dtype == torch.float32
    assert streamed_log_prob(z.double(), mu, logvar, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("score", [False, True])
@pytest.mark.parametrize(("M", "K"), [(3000, 50), (50, 3000), (3000, 3000)])
def test_bytes_read_are_those_told(M: int, K: int, score: bool) -> None:
    sources = [Counted(torch.randn(M, 3)), Counted(torch.randn(K, 3)), Counted(torch.randn(K, 3))]
    parts = StreamedScores(*sources, score=score, memory=100_000)
    for source in sources:
        source.bytes = 0  # the first row was looked at for its dtype
    told = parts.bytes_read
    assert sum(part.stop - part.start for part in parts) == M
    assert sum(source.bytes for source in sources) == told
    least = sum(source.value.nbytes for source in sources)
    assert told == least if min(M, K) == 50 else least < told < 8 * least
    assert sources[0].bytes == M * 12  # rows are read once, whatever there is


def test_blocks_fit_into_memory_and_read_least() -> None:
    for M, K, D in ((10**7, 10**5, 16), (10**7, 10**6, 16), (10**3, 10**7, 16), (10**8, 10**8, 50)):
        memory = 2**28
        rows, components = streaming.blocks(M, K, D, memory=memory)
        assert rows * 2 * D * 4 + components * 3 * (2 * D + 1) * 4 <= memory
        read = Blocks(rows, components).bytes_read(M, K, 4 * D, 8 * D)
        for fraction in range(1, 16):  # any other share of the memory for the components
            others = memory * fraction // 16
            other = Blocks(max(1, (memory - others) // (8 * D + 64)), max(1, others // (12 * (2 * D + 1))))
            assert read <= 1.1 * Blocks(*other).bytes_read(M, K, 4 * D, 8 * D)
    assert streaming.blocks(1, 1, 1, memory=1) == (1, 1)


def test_reading_goes_on_while_blocks_are_computed(cut: Callable[[int, int], None]) -> None:
    """The next block of rows is read while this one is with the caller."""

    class Told(Counted):
        def __getitem__(self, rows: slice) -> np.ndarray:
            block = super().__getitem__(rows)
            was_read[rows.start].set()
            return block

    was_read = [threading.Event() for _ in range(10)]
    z = Told(torch.randn(10, 2))
    cut(1, 3)
    parts = StreamedScores(z, torch.randn(3, 2), torch.zeros(()))
    for part in parts:
        if part.stop < 10:
            assert was_read[part.stop].wait(PATIENCE)
        assert not any(event.is_set() for event in was_read[part.stop + 1 :])  # and no more than the next
    assert z.threads - {"MainThread"} == {"fastvae-read_0"}


def test_a_failure_of_reading_reaches_the_caller(cut: Callable[[int, int], None]) -> None:
    class Broken(Counted):
        def __getitem__(self, rows: slice) -> np.ndarray:
            if rows.start >= 4:
                raise OSError(5, "Input/output error")
            return super().__getitem__(rows)

    cut(2, 3)
    parts = iter(StreamedScores(Broken(torch.randn(10, 2)), torch.randn(3, 2), torch.zeros(())))
    assert [next(parts).stop, next(parts).stop] == [2, 4]
    with pytest.raises(OSError, match="Input/output error"):
        next(parts)
    short = Counted(torch.randn(10, 2))
    short.shape = (12, 2)
    with pytest.raises(ValueError, match=r"z\[10:12\] must be \[2, 2\], not \[0, 2\]"):
        streamed_log_prob(short, torch.randn(3, 2), torch.zeros(()))


def test_no_thread_is_left_when_the_caller_stops_early(cut: Callable[[int, int], None]) -> None:
    cut(1, 3)
    for _ in StreamedScores(torch.randn(10, 2), torch.randn(3, 2), torch.zeros(())):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastvae-read")]


def test_resuming_gives_the_bits_of_the_rest(cut: Callable[[int, int], None]) -> None:
    case = hard_case(30, 60, 5)
    cut(7, 13)
    whole = streamed(case).log_prob
    parts = StreamedScores(case.z, case.mu, case.logvar, case.log_weights)
    parts.row_blocks = parts.row_blocks[2:]
    assert parts.row_blocks[0] == (14, 21)
    assert torch.equal(torch.cat([part.log_prob for part in parts]), whole[14:])


def test_gradients_are_neither_computed_nor_kept() -> None:
    z = torch.randn(5, 2, requires_grad=True)
    got = streamed_log_prob(z, torch.randn(3, 2), torch.zeros(()))
    assert not got.requires_grad
    parts = iter(StreamedScores(z, torch.randn(3, 2), torch.zeros(())))
    next(parts)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"z": torch.randn(5)}, ValueError, r"z must be \[M, D\], not \[5\]"),
        ({"z": torch.randn(2, 5, 2)}, ValueError, r"z must be \[M, D\], not \[2, 5, 2\]"),
        ({"z": [[1.0, 2.0]]}, TypeError, "z must be a tensor, a numpy.memmap or another array .* not list"),
        ({"z": np.zeros((5, 2), np.int64)}, TypeError, "z must be a floating tensor, not torch.int64"),
        ({"z": np.zeros((5, 2), "O")}, TypeError, "z cannot be read as a tensor"),
        ({"z": np.zeros((5, 2), ">f4")}, TypeError, "z cannot be read as a tensor"),
        ({"z": torch.randn(5, 3)}, ValueError, r"z must be \[..., 2\] to match mu \[3, 2\], not \[5, 3\]"),
        ({"mu": torch.randn(0, 2)}, ValueError, r"mu must be \[K, D\] with K >= 1"),
        ({"mu": torch.randn(3)}, ValueError, r"mu must be \[K, D\] with K >= 1"),
        ({"logvar": torch.randn(3)}, ValueError, r"logvar must be broadcastable to \[3, 2\]"),
        ({"log_weights": torch.randn(2)}, ValueError, r"log_weights must be \[3\]"),
        ({"memory": 0}, ValueError, "memory must be at least 1 byte"),
        ({"memory": 1e9}, TypeError, "memory must be a number of bytes"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32, torch.float64 or None"),
        ({"z": torch.randn(5, 2).to_sparse()}, TypeError, "z must be a dense tensor"),
        ({"device": "meta"}, RuntimeError, "device='meta' cannot compute here"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"precision": "low"}, ValueError, "precision"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = {"z": torch.randn(5, 2), "mu": torch.randn(3, 2), "logvar": torch.randn(3, 2)} | change
    with pytest.raises(error, match=told):
        streamed_log_prob(**arguments)


def test_every_backend(each_impl: str, cut: Callable[[int, int], None]) -> None:
    case = hard_case(9, 20, 3)
    cut(5, 6)
    want = run(case.to(torch.float64), "reference")
    got = fastvae.streamed_log_prob(case.z, case.mu, case.logvar, case.log_weights, impl=each_impl)
    assert torch.allclose(got.double(), want.log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 2], [2, 0]])
def test_a_block_without_a_share_may_have_an_infinite_score(order: list[int]) -> None:
    """As a narrow component has far away, where 1 / sigma^2 is no float32."""
    log_prob, score = torch.tensor([-1e40, 0.0, -1.0], dtype=torch.float64), torch.tensor([math.inf, 0.5, -2.0])
    merged = Merged(torch.zeros(1, 1), True)
    for block in order:
        merged.add(log_prob[block : block + 1], score[block : block + 1, None])
    found = merged.result(torch.float32)[1]
    assert found is not None and found.tolist() == [[float(score[max(order)])]]
