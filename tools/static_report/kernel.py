"""A compiled kernel, and what a family of kernels has to offer to the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        name: the kernel's.
        case: what it is compiled for, such as its precision and sizes.
        arch: 80, 90, 100.
        cubin: the machine code, with this kernel alone in it, or with `function` naming it.
        threads: of a block.
        shared: bytes of shared memory a block takes, dynamic memory included.
        work: the minimal work of a launch for `case`: multiply-adds, fp16 products, bytes and so on, by the names of
            `limits.RATES`.  Empty where nobody counted.
        tensor_cores: it is meant to use them.
        function: its name in the machine code, where that holds others too.
    """

    name: str
    case: str
    arch: int
    cubin: bytes
    threads: int
    shared: int
    work: Mapping[str, float] = field(default_factory=dict)
    tensor_cores: bool = False
    function: str | None = None


@dataclass(frozen=True)
class Family:
    """Kernels of one kind.

    Attributes:
        name: what `--family` calls it.
        missing: why it cannot be compiled here, or None.
        kernels: compile those whose "name, case" a pattern matches, for an architecture.
    """

    name: str
    missing: Callable[[], str | None]
    kernels: Callable[[int, re.Pattern[str]], Iterator[Kernel]]
