"""What is measured: the cases of each suite, in full, quickly, or for shapes of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvae.app.user_errors import ConfigError

from . import gaussian, growth, inputs, train_step
from .case import Case
from .mixture import BACKWARD, BACKWARD_Z, FORWARD, WORKS, mixture_case
from .peer import Peer
from .peers import all_peers, load_peers
from .peers.ours import ISAS

SUITES = ("mixture", "gaussian", "train-step")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        suites: some of SUITES.
        device: "cpu", or "cuda".
        shapes: (M, K, D) for the mixture suite, in place of its own.
        inputs: "diffuse", "concentrated" or a file, in place of the mixture suite's own.
        peers: names or paths of files; fastvae takes part whoever is named.  None means all that come by default.
        isas: instruction sets of fastvae to measure beside the best one, everywhere.
        quick: small problems and few rounds: it tells that all works, not how fast it is.
    """

    suites: tuple[str, ...] = SUITES
    device: str = "cpu"
    shapes: tuple[Shape, ...] = ()
    inputs: str | None = None
    peers: tuple[str, ...] | None = None
    isas: tuple[str, ...] = ()
    quick: bool = False

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                raise ConfigError(f"there is no suite {suite!r}; the suites are {', '.join(SUITES)}")
        if (self.shapes or self.inputs) and "mixture" not in self.suites:
            raise ConfigError("--shapes and --inputs are for the suite mixture, which is not asked for")
        for isa in self.isas:
            if isa not in ISAS:
                raise ConfigError(f"--isa {isa}: the instruction sets are {', '.join(ISAS)}")
        if self.isas and self.device != "cpu":
            raise ConfigError(f"--isa is for the CPU, the device is {self.device}")

    def cases(self) -> list[Case]:
        """All cases, in the order in which they are to be measured."""
        makers = {"mixture": self._mixture, "gaussian": self._gaussian, "train-step": self._train_step}
        cases = [case for suite in SUITES if suite in self.suites for case in makers[suite]()]
        if not cases:
            raise ConfigError(f"--peers {','.join(self.peers or ())}: none of them takes part in what is asked for")
        return cases

    def _mixture(self) -> Iterator[Case]:
        known = all_peers()
        peers = self._mixture_peers(known)
        ours = known["fastvae"]
        dense, composite = known["fastvae-dense"], known["fastvae-composite"]
        isas = [known[f"fastvae-{isa}"] for isa in ISAS] if self.device == "cpu" else []

        def case(work: str, source: str, shape: Shape, who: Iterable[Peer], *, shared: bool = False) -> Case:
            return mixture_case(work, source, shape, _unique(who), device=self.device, shared=shared)

        if self.shapes or self.inputs:
            source = self.inputs or "diffuse"
            for shape in self.shapes or self._default_shapes(source):
                if source not in inputs.SYNTHETIC:
                    inputs.make(source, *shape)  # what does not fit is told before anything is measured
                for work in WORKS:
                    yield case(work, source, shape, peers)
            return
        latents = inputs.find_latents()
        real = str(latents) if latents else "concentrated"
        if self.quick:
            for source in ("diffuse", "concentrated"):
                yield case(FORWARD, source, (128, 1000, 16), [*peers, composite, *isas])
                yield case(BACKWARD, source, (128, 1000, 16), [*peers, dense, *isas])
            yield case(BACKWARD_Z, "diffuse", (128, 1000, 16), peers)
            yield case(FORWARD, "diffuse", (128, 1000, 16), [ours], shared=True)
            yield from growth.against_k(peers, self.device, (100, 1000), M=64, D=8)
            yield from growth.alone(ours, self.device, decades=1)
            yield from growth.roofline([ours, known["expansion"]], self.device, 1000, 8, (1, 64))
            return
        large, larger = (1024, 10_000, 40), (256, 50_000, 64)
        yield case(FORWARD, "diffuse", large, [*peers, *isas])
        yield case(BACKWARD, "diffuse", large, [*peers, *isas])
        yield case(BACKWARD_Z, "diffuse", large, peers)
        yield case(FORWARD, "diffuse", larger, [*peers, *isas])
        yield case(BACKWARD, "diffuse", larger, peers)
        yield case(FORWARD, real, (1024, 25_000, 40), peers)
        yield case(BACKWARD, real, (1024, 25_000, 40), [*peers, dense, *isas])
        yield case(FORWARD, "diffuse", (100, 500, 40), [*peers, composite])
        yield case(BACKWARD, "diffuse", (100, 500, 40), [*peers, composite])
        for D in (2, 8, 16, 128):
            yield case(FORWARD, "diffuse", (1024, 10_000, D), peers)
        yield case(FORWARD, "diffuse", larger, [ours], shared=True)
        yield case(BACKWARD, "diffuse", larger, [ours], shared=True)
        yield from growth.against_k(peers, self.device, (100, 1000, 10_000, 100_000, 1_000_000))
        yield from growth.alone(ours, self.device, decades=4)
        yield from growth.roofline([ours, known["expansion"]], self.device, 200_000, 64, (1, 4, 16, 64, 256))

    def _gaussian(self) -> Iterator[Case]:
        names = self._names(gaussian.NAMES)
        shapes = [(64, 16)] if self.quick else [(16_384, 256), (100, 40)]
        return gaussian.gaussian_cases(shapes, names, device=self.device) if len(names) > 1 else iter(())

    def _train_step(self) -> Iterator[Case]:
        names = self._names(train_step.NAMES)
        if len(names) == 1:
            return iter(())
        if self.quick:
            small = train_step.Sizes(pixels=64, hidden=32, latent=8, batch=16)
            return train_step.train_step_cases([50], names, device=self.device, sizes=small)
        return train_step.train_step_cases([500, 5000], names, device=self.device)

    def _names(self, names: Sequence[str]) -> list[str]:
        """Those of a suite's contenders that are asked for; fastvae always."""
        return [name for name in names if name == "fastvae" or self.peers is None or name in self.peers]

    def _mixture_peers(self, known: dict[str, Peer]) -> list[Peer]:
        chosen = [known["fastvae"]]
        if self.peers is None:
            chosen += [peer for peer in known.values() if not peer.on_request]
        else:
            elsewhere = {*gaussian.NAMES, *train_step.NAMES}
            for name in self.peers:
                if name.endswith(".py"):
                    chosen += load_peers(Path(name)).values()
                elif name in known:
                    chosen.append(known[name])
                elif name not in elsewhere:
                    raise ConfigError(
                        f"--peers: there is no peer {name!r}; there are {', '.join([*known, *elsewhere - {*known}])}, "
                        "or the path of a .py file"
                    )
        return _unique([*chosen, *(known[f"fastvae-{isa}"] for isa in self.isas)])

    def _default_shapes(self, source: str) -> list[Shape]:
        if source in inputs.SYNTHETIC:
            return [(128, 1000, 16)] if self.quick else [(1024, 10_000, 40)]
        found = inputs.from_file(Path(source))
        K, D = found.mu.shape
        return [(min(64, len(found.z)), min(1000, K), D) if self.quick else (len(found.z), K, D)]


def _unique(peers: Iterable[Peer]) -> list[Peer]:
    """Each name once, in order."""
    return list({peer.name: peer for peer in peers}.values())
