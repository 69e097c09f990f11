"""Every peer computes the mixture's density, and one that does not is caught."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.case import measure, problems
from benchmarks.inputs import MixtureInputs, concentrated, diffuse
from benchmarks.mixture import BACKWARD, BACKWARD_Z, FORWARD, Verification, mixture_case
from benchmarks.peers import all_peers, eager, load_peers
from benchmarks.peers.ours import ISAS
from fastvae import reference
from fastvae.app.errors import ConfigError

from .conftest import TINY

PEERS = all_peers()
SHAPE = (12, 40, 3)


def status(entry: dict) -> str:
    return str(entry["status"])


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if not peer.compiled])
@pytest.mark.parametrize("source", ["diffuse", "concentrated"])
def test_a_peer_agrees_with_float64(name: str, source: str) -> None:
    peer = PEERS[name]
    if why := peer.missing("cpu"):
        pytest.skip(why)
    if "cpu" not in peer.devices:
        pytest.skip(f"{name} does not run on the CPU")
    # KeOps compiles something for each set of gradients; forward shows that it is called as it should be.
    works = [FORWARD] if name == "keops" or not peer.differentiable else [FORWARD, BACKWARD, BACKWARD_Z]
    for work in works:
        entry = measure(mixture_case(work, source, SHAPE, [peer]), TINY, "cpu", {})["contenders"][name]
        assert status(entry) == "measured", entry
        assert entry["errors"]["log_prob"] < peer.allowed_error
        assert set(entry["errors"]) - {"log_prob"} == set(
            {FORWARD: (), BACKWARD: ("z", "mu", "logvar", "log_weights"), BACKWARD_Z: ("z",)}[work]
        )
        assert entry["seconds"]["rounds"] == 3 and entry["seconds"]["median"] > 0


def test_flash_gmm_is_given_what_its_documentation_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module in its place, since it runs on a GPU alone: data, means, log variances [K, D], log weights."""
    stand_in = ModuleType("flash_gmm_diag_h100")

    def estep(x: Tensor, mu: Tensor, log_sigma_sq: Tensor, log_pi: Tensor) -> tuple[Tensor, ...]:
        assert log_sigma_sq.shape == mu.shape and log_sigma_sq.is_contiguous()
        return reference.mixture_log_prob(x, mu, log_sigma_sq, log_pi), log_pi, mu, mu

    monkeypatch.setattr(stand_in, "flash_gmm_estep_diag", estep, raising=False)
    monkeypatch.setitem(sys.modules, "flash_gmm_diag_h100", stand_in)
    peer = PEERS["flash-gmm"]
    assert peer.unfit("cpu", *SHAPE, False, 10**9) and peer.unfit("cuda", *SHAPE, True, 10**9)
    data = diffuse(*SHAPE)
    for logvar in (data.logvar, data.logvar[:1]):
        want = reference.mixture_log_prob(data.z, data.mu, logvar, data.log_weights)
        assert torch.equal(peer.log_prob(data.z, data.mu, logvar, data.log_weights), want)


def test_an_instruction_set_that_the_machine_lacks_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its kernels nor its probe are run, which would end the process."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    peers = [PEERS["fastvae"], *(PEERS[f"fastvae-{isa}"] for isa in ISAS)]
    found = measure(mixture_case(FORWARD, "diffuse", SHAPE, peers), TINY, "cpu", {})
    told = {name: (entry["status"], entry.get("why")) for name, entry in found["contenders"].items()}
    assert told["fastvae-avx2"] == ("missing", "needs avx2, which this machine does not have")
    assert told["fastvae-avx512"][0] == "missing"
    assert told["fastvae"][0] == told["fastvae-baseline"][0] == "measured"
    assert "multiply_add_baseline" in found["limits"] and "multiply_add_avx512" not in found["limits"]


def test_the_compiled_peers_are_the_eager_ones() -> None:
    """What torch.compile makes of them is torch's business; that they are put under it is ours."""
    for name, source in (("eager-compile", "eager"), ("expansion-compile", "expansion")):
        assert PEERS[name].compiled and PEERS[name].log_prob is PEERS[source].log_prob


WRONG = {
    "a constant": lambda z, mu, logvar, w: eager.log_prob(z, mu, logvar, w) + 0.01,
    "log 2 pi dropped": lambda z, mu, logvar, w: eager.log_prob(z, mu, logvar, w) + 0.9189385 * z.shape[1],
    "variance for scale": lambda z, mu, logvar, w: eager.log_prob(z, mu, 2 * logvar, w),
    "a detached parameter": lambda z, mu, logvar, w: eager.log_prob(z, mu.detach() + 0 * mu, logvar, w),
    "float16": lambda z, mu, logvar, w: eager.log_prob(z.half().float(), mu.half().float(), logvar, w),
    "NaN": lambda z, mu, logvar, w: eager.log_prob(z, mu, logvar, w) * float("nan"),
    "one row": lambda z, mu, logvar, w: eager.log_prob(z, mu, logvar, w)[:1],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_peer_is_caught(what: str) -> None:
    wrong = replace(eager.PEER, name="wrong", log_prob=WRONG[what])
    work = FORWARD if what == "one row" else BACKWARD  # autograd would find that itself
    result = measure(mixture_case(work, "concentrated", SHAPE, [eager.PEER, wrong]), TINY, "cpu", {})
    assert status(result["contenders"]["eager"]) == "measured"
    assert status(result["contenders"]["wrong"]) == "wrong" and "seconds" not in result["contenders"]["wrong"]
    (found,) = problems(result)
    assert found.startswith("wrong gives a wrong result: ")


def test_a_peer_that_raises_does_not_end_the_run() -> None:
    def broken(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a long explanation")

    peers = [replace(eager.PEER, name="broken", log_prob=broken), eager.PEER]
    result = measure(mixture_case(FORWARD, "diffuse", SHAPE, peers), TINY, "cpu", {})
    assert problems(result) == ["broken fails: RuntimeError: no such kernel"]
    assert status(result["contenders"]["eager"]) == "measured"


def test_who_cannot_take_part_is_named_with_the_reason() -> None:
    peers = [
        replace(eager.PEER, name="missing", needs=("no_such_package",)),
        replace(eager.PEER, name="large", full_arrays=(1e15, 1e15)),
        replace(eager.PEER, name="elsewhere", devices=("cuda",)),
        PEERS["scikit-learn"],
    ]
    found = measure(mixture_case(BACKWARD, "diffuse", SHAPE, peers), TINY, "cpu", {})["contenders"]
    assert found["missing"] == {"status": "missing", "why": "needs no_such_package, not installed"}
    assert status(found["large"]) == "skipped" and "GB of memory" in found["large"]["why"]
    assert found["elsewhere"]["why"] == "does not run on cpu"
    assert status(found["scikit-learn"]) in ("skipped", "missing")


def test_gradients_in_the_weights_are_checked_as_logits_only_where_that_is_said() -> None:
    plain = replace(PEERS["mixture-same-family"], normalizes=False)
    entry = measure(mixture_case(BACKWARD, "diffuse", SHAPE, [plain]), TINY, "cpu", {})["contenders"][plain.name]
    assert status(entry) == "wrong" and "log_weights" in entry["why"]


def test_the_peer_in_the_docs_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarking.md"
    (source,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "chunks.py").write_text(source)
    peer = load_peers(tmp_path / "chunks.py")["chunks"]
    for work in (FORWARD, BACKWARD):
        entry = measure(mixture_case(work, "diffuse", (5, 600, 3), [peer]), TINY, "cpu", {})["contenders"]["chunks"]
        assert status(entry) == "measured", entry


def test_a_file_without_a_peer_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="neither PEER nor PEERS"):
        load_peers(tmp_path / "empty.py")
    with pytest.raises(ConfigError, match="no file"):
        load_peers(tmp_path / "absent.py")


def live(data: MixtureInputs) -> float:
    return float(Verification(data, FORWARD).facts["live_pairs"])


def test_inputs_are_as_concentrated_as_they_say() -> None:
    assert live(diffuse(64, 2000, 40)) == 1.0
    assert 0.0 < live(concentrated(64, 2000, 40)) < 0.05
    again, other = concentrated(4, 20, 3), concentrated(4, 20, 3, seed=1)
    assert torch.equal(again.z, concentrated(4, 20, 3).z) and not torch.equal(again.z, other.z)
