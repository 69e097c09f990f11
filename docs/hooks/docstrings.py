"""Docstrings as Markdown: cross-references for the roles of reStructuredText, one colon before an example for two.

A method without a docstring has that of the method which it overrides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Docstring, Extension, GriffeError, Module, Object

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?(?P<name>[\w.]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)


class MarkdownDocstrings(Extension):
    """Rewrites the docstrings of a package when all of it has been read, before they are parsed."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for obj in everything(pkg):
            if obj.docstring is None:
                obj.docstring = inherited_docstring(obj)
            if obj.docstring is not None:
                text = ROLE.sub(lambda role: reference(obj, role["name"]), obj.docstring.value)  # noqa: B023
                obj.docstring.value = LITERAL.sub(":", text)


def everything(obj: Object) -> Iterator[Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from everything(member)


def inherited_docstring(obj: Object) -> Docstring | None:
    if obj.is_function and obj.parent is not None and obj.parent.is_class:
        for base in obj.parent.mro():
            member = base.members.get(obj.name)
            if member is not None and member.docstring is not None:
                inherited = member.docstring
                return Docstring(
                    inherited.value, parent=obj, parser=inherited.parser, parser_options=inherited.parser_options
                )
    return None


def reference(obj: Object, name: str) -> str:
    """`name`, linked to what it is called where `obj` is defined; a method may be one of a base class."""
    where = obj.parent if obj.parent is not None and obj.parent.is_class else None
    if where is not None and name not in where.members and name in where.inherited_members:
        return f"[`{name}`][{where.inherited_members[name].target_path}]"
    try:
        return f"[`{name}`][{obj.resolve(name)}]"
    except GriffeError:
        return f"[`{name}`][{name}]"  # a full name; the build fails where there is none such
