"""What an audit found, in words."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


class AuditError(Exception):
    """A prior has known mistakes; the message is the report, `report` has it as an object."""

    def __init__(self, report: AuditReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: which known mistake it is, such as "variance-as-scale"; "unexplained" where it is none of them.
        words: what is wrong.
        nats: how far off this mistake alone is, the median over typical points; None where nats do not measure it.
        where: for which inputs.
        remedy: what to do.
    """

    name: str
    words: str
    nats: float | None
    where: str
    remedy: str

    def __str__(self) -> str:
        size = "" if self.nats is None else f" ({self.nats:.3g} nats)"
        lines = [f"{self.name}{size}: {self.words}", f"where: {self.where}", f"do: {self.remedy}"]
        return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)


@dataclass(frozen=True)
class AuditReport:
    """What :func:`fastvae.audit` returns: true if nothing is wrong, so that `assert fastvae.audit(prior)` is a test.

    Attributes:
        findings: what is wrong, empty if nothing is.
        checked: what was looked at.
        untested: what could not be told with these components or without more arguments, each with the reason.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    untested: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.findings

    @property
    def names(self) -> list[str]:
        """The names of the findings."""
        return [finding.name for finding in self.findings]

    def raise_if_wrong(self) -> AuditReport:
        """This report, if nothing is wrong.

        Raises:
            AuditError: something is; the message is the report.
        """
        if self.findings:
            raise AuditError(self)
        return self

    def __str__(self) -> str:
        count = len(self.findings)
        told = "nothing wrong was found" if not count else f"{count} finding{'s' if count > 1 else ''}"
        parts = [f"fastvae.audit: {told} in {', '.join(self.checked)}."]
        parts += [textwrap.indent(f"{n}. {finding}", "   ").strip() for n, finding in enumerate(self.findings, start=1)]
        if self.untested:
            parts.append("Not tested:\n" + "\n".join(f"  - {reason}" for reason in self.untested))
        return "\n".join(parts)
