"""What a caller asks of the backends where a call itself does not say: `use_backend`, and the arguments of classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypedDict

import torch

from fastvae.backends import registry


class BackendOptions(TypedDict, total=False):
    """The arguments by which a function or a class lets its caller choose; None, or not given: not said.

    Attributes:
        impl: "cpu", "cuda", "triton", "composite" or "reference", see :func:`fastvae.mixture_log_prob`.
        precision: "highest", "high" or "medium".
        dense_backward: whether backward computes every term, which by default it does not.
    """

    impl: str | None
    precision: str | None
    dense_backward: bool | None


class Choice(NamedTuple):
    """What was asked for; None: not said."""

    impl: str | None = None
    precision: str | None = None
    dense_backward: bool | None = None


NO_OPTIONS: BackendOptions = {"impl": None, "precision": None, "dense_backward": None}

# What the open blocks of `use_backend` say, the innermost last.  For the whole process, as PyTorch's own settings are:
# torch.compile guards a global by its value and compiles anew where that has changed, which it does not do for what
# belongs to a thread or a context.
_blocks: tuple[Choice, ...] = ()


def choose(
    impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32, precision: str | None = "highest"
) -> str:
    """The name in BACKENDS of the backend that runs, or "reference".

    Args:
        impl: the backend's word.  None means what :func:`fastvae.use_backend` says.  If that says nothing, the first
            in BACKENDS is taken that is a default on the device, can run there and has the precision; where none has
            the precision, the first that is a default and can run.
        device: where the tensors are.
        dtype: what is computed with.
        precision: for float32.  A backend that has no such precision computes with the highest, as all do in float64.
            None is what `use_backend` says, else PyTorch's own setting.  That setting allows less than the highest and
            does not ask for it: it changes how a backend computes, and not which one is taken.

    Raises:
        ValueError: no backend has that name, or the one named does not take tensors on that device.
        RuntimeError: the backend named cannot run here; the message says what would make it run.
    """
    if impl is None:
        impl = current().impl
    if precision is None:
        precision = current().precision
    return registry.choose(impl, device, dtype, precision)


def dense(dense_backward: bool | None) -> bool:
    """Whether backward computes every term: None is what `use_backend` says, if it does, else False."""
    return bool(current().dense_backward if dense_backward is None else dense_backward)


def checked(owner: str, options: BackendOptions) -> BackendOptions:
    """All three options, None where not given; `owner` is whose they are, for the error message.

    Raises:
        TypeError: there is no such argument, or dense_backward is no bool.
        ValueError: there is no such backend or precision.
    """
    known = {"impl", "precision", "dense_backward"}
    for name in options:
        if name not in known:
            raise TypeError(f"{owner}() got an unexpected keyword argument {name!r}")
    impl, precision, dense_backward = options.get("impl"), options.get("precision"), options.get("dense_backward")
    registry.check_name("impl", impl, registry.IMPLS)
    registry.check_name("precision", precision, registry.PRECISIONS)
    if dense_backward is not None and not isinstance(dense_backward, bool):
        raise TypeError(f"dense_backward must be True, False or None, not {dense_backward!r}")
    return {"impl": impl, "precision": precision, "dense_backward": dense_backward}


def current() -> Choice:
    """What `use_backend` says here."""
    return _blocks[-1] if _blocks else Choice()


@contextmanager
def exactly(wanted: Choice) -> Iterator[None]:
    """Have `current()` be this choice inside, whatever is said outside."""
    global _blocks
    _blocks = (*_blocks, wanted)
    try:
        yield
    finally:  # of its own entry alone: blocks of several threads need not end in the order of a stack
        at = len(_blocks) - 1 - _blocks[::-1].index(wanted)
        _blocks = _blocks[:at] + _blocks[at + 1 :]


def use_backend(
    impl: str | None = None, *, precision: str | None = None, dense_backward: bool | None = None
) -> AbstractContextManager[None]:
    """Choose the backend of all operations inside, where a call, a prior or a model does not choose itself.

    Args:
        impl, precision, dense_backward: as of :func:`fastvae.mixture_log_prob`.  None leaves what was said outside.

    Returns:
        A context manager, which also decorates functions (but not generators).

    Backward runs where forward ran, also after the block has ended.  Only what `torch.utils.checkpoint` computes again
    in backward follows what is said then.  The choice holds for the whole process: other threads see it while the block
    lasts.

    Raises:
        TypeError, ValueError: as :func:`fastvae.mixture_log_prob`, at once for a name that there is not.

    Example::

        with fastvae.use_backend("triton", precision="high"):
            loss = vae(x).loss
    """
    checked("use_backend", {"impl": impl, "precision": precision, "dense_backward": dense_backward})
    return _inside(impl, precision, dense_backward)


@contextmanager
def _inside(impl: str | None, precision: str | None, dense_backward: bool | None) -> Iterator[None]:
    outside = current()
    inside = Choice(
        outside.impl if impl is None else impl,
        outside.precision if precision is None else precision,
        outside.dense_backward if dense_backward is None else dense_backward,
    )
    with exactly(inside):
        yield


def with_options(options: BackendOptions) -> AbstractContextManager[None]:
    """`use_backend` with these; nothing, which takes no time, where none is given."""
    return nullcontext() if all(value is None for value in options.values()) else use_backend(**options)
