"""Help that can be read on a narrow terminal."""

from __future__ import annotations

import shutil
from typing import Any

from typer.core import TyperCommand, TyperGroup

from fastvae.app.show.width import NARROW

BESIDE_NAMES = 45  # what types, texts and borders should have beside the two columns of names


class NarrowHelp:
    """Gives an option's names and its text a line each where the terminal is narrow, in place of columns."""

    def format_help(self: Any, context: Any, formatter: Any) -> None:
        """Write the help, as click calls for it."""
        width, parameters = shutil.get_terminal_size().columns, self.get_params(context)
        first = max(len(parameter.opts[0]) for parameter in parameters)
        second = max(len(name) for p in parameters for name in ("", *p.opts[1:], *p.secondary_opts))
        if width >= max(NARROW, first + second + BESIDE_NAMES):
            super().format_help(context, formatter)  # type: ignore[misc]
            return
        formatter.width = width - 1
        self.format_usage(context, formatter)
        self.format_help_text(context, formatter)
        formatter.write_paragraph()
        records = [parameter.get_help_record(context) for parameter in parameters]
        if isinstance(self, TyperGroup):
            records += [(name, command.get_short_help_str(limit=1000)) for name, command in self.commands.items()]
        for record in filter(None, records):
            names, text = record
            formatter.write_text(names)
            with formatter.indentation():
                formatter.write_text(text)


class Command(NarrowHelp, TyperCommand):
    """A command whose help can be read on a narrow terminal."""


class Group(NarrowHelp, TyperGroup):
    """The group of all commands, likewise."""
