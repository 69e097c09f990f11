"""Published figures, each with the settings by which it is reproduced: the files in fastvae/app/protocols."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import to_json

from fastvae.app.run.config import TrainConfig, make_config
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.user_errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = files("fastvae.app") / "protocols"
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@checked_dataclass(frozen=True, config=_STRICT)
class Published:
    """A figure as it was published.

    Attributes:
        log_likelihood: nats per test image.
        source: the work that reports it, and where.
        looked_up: where the figure was seen; empty where it was written down from memory.
    """

    log_likelihood: float
    source: str
    looked_up: str


@checked_dataclass(frozen=True, config=_STRICT)
class _File:
    """What a protocol's file may say."""

    title: str
    train: dict[str, Any]
    published: tuple[Published, ...] = ()
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """What to train and how to measure it, with the figures to be met.

    Attributes:
        name: as the command line knows it.
        title: what it is, in words.
        config: the settings of its training runs.
        plan: how the best model is measured.
        published: the figures; the first is the one that is to be met.
        differences: what is not as it was published, a sentence each.
    """

    name: str
    title: str
    config: TrainConfig
    plan: EvaluationPlan
    published: tuple[Published, ...]
    differences: tuple[str, ...]


def protocol_names() -> list[str]:
    """The names of all protocols, in alphabetical order."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def read_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in protocol_names():
        raise ConfigError(f"There is no protocol {name!r}; there are {', '.join(protocol_names())}.")
    content = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    said = TypeAdapter(_File).validate_json(to_json(content))  # strict, but lists may be tuples
    config = make_config(said.train)
    return Protocol(name, said.title, config, EvaluationPlan(), said.published, said.differences)
