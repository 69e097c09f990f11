"""Triton's interpreter, without what makes it slow: it patches its whole language anew at each call of a helper."""

from __future__ import annotations

from typing import Any

import pytest


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls within kernels patch a set of modules once; the launch of a kernel still patches and restores them."""
    from triton.runtime import interpreter

    patched: set[frozenset[int]] = set()

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        language = interpreter.tl
        modules = frozenset(id(v) for v in self.fn.__globals__.values() if v is language or v is language.core)
        if id(language) not in modules and modules not in patched:  # a launch patches triton.language itself
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        return self.rewrite()(*arguments, **named)

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter.InterpretedFunction, "rewrite"):
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
