"""Triton's interpreter, without what makes it slow.

At each call of a helper it patches its whole language anew.  And each result of an operation has a type that is made
anew: most of the time of a kernel on small tiles goes into tuples of constants for shapes.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any


@cache
def hasten() -> None:
    """From now on it patches a set of modules once, and makes each type once; as far as this version of it is known."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return  # a compiler is left as it is
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter.InterpretedFunction, "rewrite"):
        _patch_once(interpreter)
    if _types_are_known(interpreter):
        _make_types_once(interpreter)


def _types_are_known(interpreter: Any) -> bool:
    core = interpreter.tl.core
    block = core.block_type(core.float32, [2])
    return (
        tuple(vars(block)) == ("element_ty", "shape", "numel", "name")
        and tuple(vars(core.tensor(None, block))) == ("handle", "shape", "numel", "type", "dtype")
        and isinstance(block.shape, getattr(core, "tuple", ()))
        and hasattr(interpreter, "_get_np_dtype")
        and hasattr(getattr(interpreter, "interpreter_semantic", None), "broadcast_impl_value")
    )


def _patch_once(interpreter: Any) -> None:
    """Calls within kernels patch a set of modules once; the launch of a kernel still patches and restores them."""
    patched: set[frozenset[int]] = set()

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        language = interpreter.tl
        modules = frozenset(id(v) for v in self.fn.__globals__.values() if v is language or v is language.core)
        if id(language) not in modules and modules not in patched:  # a launch patches triton.language itself
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call


def _make_types_once(interpreter: Any) -> None:
    """What is made of an element type and a shape, and what a tensor has of its type, is remembered."""
    core = interpreter.tl.core
    make_block, make_tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    semantic, compare = type(interpreter.interpreter_semantic), core.tuple.__eq__
    broadcast = semantic.broadcast_impl_value
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, tuple[Any, Any]] = {}
    numpy_types: dict[str, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = element_ty.name, *sizes, *map(type, sizes)  # 2, 2.0 and True are alike to a dictionary
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = self.shape, self.numel
        shape, numel = tensors[type.name]
        vars(self).update(handle=handle, shape=shape, numel=numel, type=type, dtype=type.scalar)

    def equal(self: Any, other: Any) -> Any:
        if isinstance(other, list) and all(type(v) is int for v in [*self.values, *other]):
            return core.constexpr(self.values == other)
        return compare(self, other)

    def broadcast_unless_alike(self: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values:
            return left, right
        return broadcast(self, left, right)

    def remembered(tt_dtype: Any) -> Any:
        if tt_dtype.name not in numpy_types:
            numpy_types[tt_dtype.name] = numpy_type(tt_dtype)
        return numpy_types[tt_dtype.name]

    core.block_type.__init__ = block
    core.tensor.__init__ = tensor
    core.tuple.__eq__ = equal
    semantic.broadcast_impl_value = broadcast_unless_alike
    interpreter._get_np_dtype = remembered
