"""Other processes: what an import pulls in, forked children, DataLoader workers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.backend import device_of
from support.patience import PATIENCE

import fastvae

ROOT = Path(__file__).parents[2]


def run(script: str, *args: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone() -> None:
    """What `import fastvae` brings, beyond what `import torch` has brought already, is its own."""
    script = """
        import sys, torch
        before = set(sys.modules)
        import fastvae
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - set(sys.stdlib_module_names)))
        print(*sorted(name for name in sys.modules if name.startswith("fastvae")))
    """
    packages, modules = run(script).splitlines()
    # torch is free to load what it likes when more of it is imported
    foreign = set(packages.split()) - {"fastvae", "torch"}
    assert not foreign & {"numpy", "scipy", "matplotlib", "sklearn", "triton", "rich", "typer"}, foreign
    assert not any(name.startswith(("fastvae.app", "fastvae.kernels")) for name in modules.split())


def test_runs_where_nothing_else_is_installed() -> None:
    """With triton, numpy and every extra blocked, as on a machine that has torch alone."""
    script = """
        import sys
        for name in ("triton", "numpy", "matplotlib", "sklearn", "scipy", "rich", "typer", "lightning"):
            sys.modules[name] = None
        import warnings; warnings.simplefilter("ignore")
        import torch, fastvae
        z = torch.randn(4, 3, requires_grad=True)
        fastvae.mixture_log_prob(z, torch.randn(5, 3), torch.zeros(())).sum().backward()
        fastvae.mixture_kl(z, z, torch.randn(5, 3), torch.zeros(()))[1].sum().backward()
        print(z.grad.shape, fastvae.info()["torch"] == torch.__version__)
    """
    assert run(script).split("\n")[0] == "torch.Size([4, 3]) True"


FORK = """
    import os, sys, signal, torch, fastvae
    impl, start = sys.argv[1:]
    torch.set_num_threads(2)
    # enough for two threads; of an interpreter it would ask for half a minute
    M, K, S = (20, 30, 3) if impl == "triton" else (200, 300, 30)
    args = torch.randn(M, 20), torch.randn(K, 20), torch.randn(K, 20)

    def job():
        leaves = [v.clone().requires_grad_() for v in args]
        torch.manual_seed(0)
        log_prob = fastvae.mixture_log_prob(*leaves, impl=impl)
        z, log_q = fastvae.gaussian_rsample(*leaves[1:], S, impl=impl)
        kl = fastvae.gaussian_kl(*leaves[1:], impl=impl)
        grads = torch.autograd.grad(log_prob.sum() + z.sum() + log_q.sum() + kl.sum(), leaves)
        return log_prob.detach(), z.detach(), *grads

    def child():
        torch.set_num_threads(1)  # else torch.exp itself hangs: OpenMP's threads do not survive a fork
        signal.alarm(100)  # a deadlock must not outlive the test
        same = all(torch.equal(a, b) for a, b in zip(job(), want))
        sys.exit(0 if same else 3)

    want = job()  # the parent's threads exist from here on
    if start == "fork":
        pid = os.fork()
        if pid == 0:
            child()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        code = process.exitcode
    again = all(torch.equal(a, b) for a, b in zip(job(), want))
    print(code, again)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("start", ["fork", "multiprocessing"])
def test_a_forked_child_computes_the_same(each_impl: str, start: str) -> None:
    """After the parent has used every kernel with two threads: the same bits, and no deadlock.

    The child first sets one thread, as a DataLoader's worker does: PyTorch's own operators need that.
    """
    if device_of(each_impl).type == "cuda":
        pytest.skip("a child cannot use CUDA after its parent has: test_gpu_a_forked_child_is_told_why")
    assert run(FORK, each_impl, start).split() == ["0", "True"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_needs_no_care() -> None:
    """The kernels themselves run in a child that has kept the parent's two threads, where torch.exp would hang."""
    script = """
        import os, signal, sys, torch, fastvae
        torch.set_num_threads(2)
        z, mu = torch.randn(200, 20), torch.randn(3000, 20)
        torch.randn(1000, 1000).exp()  # now there are two threads
        pid = os.fork()
        if pid == 0:
            signal.alarm(100)
            os._exit(0 if fastvae.mixture_log_prob(z, mu, torch.zeros(()), impl="cpu").isfinite().all() else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    assert run(script).split() == ["0"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_gpu_a_forked_child_is_told_why(impl: str) -> None:
    """CUDA does not survive a fork: an error that names the start method that works, and the parent goes on."""
    if (why := fastvae.info()[f"impl={impl!r}"]).startswith("missing"):
        pytest.skip(why)
    script = """
        import os, signal, sys, torch, fastvae
        z, mu = torch.randn(20, 5, device="cuda"), torch.randn(30, 5, device="cuda")
        want = fastvae.mixture_log_prob(z, mu, mu, impl=sys.argv[1])
        torch.cuda.synchronize()
        pid = os.fork()
        if pid == 0:
            signal.alarm(100)
            try:
                fastvae.mixture_log_prob(z, mu, mu, impl=sys.argv[1])
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(error, flush=True)
                os._exit(0 if "'spawn'" in str(error) else 4)
            os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, torch.equal(fastvae.mixture_log_prob(z, mu, mu, impl=sys.argv[1]), want))
    """
    told = run(script, impl)
    assert told.splitlines()[-1].split() == ["0", "True"], told


class Scores(torch.utils.data.Dataset[torch.Tensor]):
    """Each item is made with the kernels, so that workers run them; what goes between processes is on the CPU."""

    def __init__(self, impl: str, device: torch.device) -> None:
        self.impl, self.device = impl, device
        self.mu = torch.arange(21.0).reshape(7, 3) / 10

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> torch.Tensor:
        import fastvae

        z = torch.full((2, 3), i / 10.0, device=self.device, requires_grad=True)
        mu, logvar = self.mu.to(self.device), torch.zeros((), device=self.device)
        log_prob, score = fastvae.mixture_log_prob_and_score(z, mu, logvar, impl=self.impl)
        (dz,) = torch.autograd.grad(log_prob.sum(), z)
        return torch.cat([log_prob.detach()[:, None], score, dz], 1).cpu()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(each_impl: str, context: str) -> None:
    """On the CPU by either start method; on a GPU by spawn, and PyTorch says so where it is fork."""
    device = device_of(each_impl)
    data = Scores(each_impl, device)
    want = torch.stack([data[i] for i in range(len(data))])
    loader = torch.utils.data.DataLoader(
        data, batch_size=3, num_workers=2, multiprocessing_context=context, timeout=PATIENCE
    )
    if device.type == "cuda" and context == "fork":
        with pytest.raises(RuntimeError, match="'spawn' start method"):
            list(loader)
        return
    assert torch.equal(torch.cat(list(loader)), want)
