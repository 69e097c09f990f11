"""Every file here is a peer, or a few: a module with PEER, or PEERS.  A new file is found by being here."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from fastvae.app.user_errors import ConfigError

from ..peer import Peer


def all_peers() -> dict[str, Peer]:
    """Every peer of this folder by name, ours first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [peer for module in modules for peer in _peers_of(module)]
    return {peer.name: peer for peer in sorted(found, key=lambda peer: not peer.ours)}


def load_peers(path: Path) -> dict[str, Peer]:
    """The peers of one file that stands elsewhere; it may use relative imports as if it stood here.

    Raises:
        ConfigError: there is no such file, or it has neither PEER nor PEERS.
    """
    if not path.is_file():
        raise ConfigError(f"--peers: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = _peers_of(module)
    if not found:
        raise ConfigError(f"--peers: {path} has neither PEER nor PEERS; see docs/benchmarking.md")
    return {peer.name: peer for peer in found}


def _peers_of(module: ModuleType) -> tuple[Peer, ...]:
    single = (module.PEER,) if hasattr(module, "PEER") else ()
    return single + tuple(getattr(module, "PEERS", ()))
