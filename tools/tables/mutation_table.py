"""Which tier of the tests catches which mutation: from the record of `python -m tools.mutations --record`."""

from __future__ import annotations

from fastvae.benchmarks import formatting

from .registry import Results, table


@table("mutations", "mutations.json")
def mutations(results: Results) -> str:
    """A line for each family of code: how many mutations, and those that the fast tier leaves to the slow one."""
    record = results.read("mutations.json")
    families: dict[str, list[tuple[str, str]]] = {}
    for name, found in record["mutations"].items():
        family, _, what = name.partition(": ")
        families.setdefault(family, []).append((what, found["tier"]))
    rows = []
    for family, found in families.items():
        by_tier = {tier: [what for what, of in found if of == tier] for tier in ("fast", "full", "none")}
        missed = "; ".join(by_tier["none"]) or formatting.NOTHING
        left = "; ".join(by_tier["full"]) or formatting.NOTHING
        rows.append([family, str(len(found)), str(len(by_tier["fast"])), left, missed])
    head = ["code", "mutations", "caught by `make test`", "caught by `make test-slow` alone", "not caught"]
    where = f"Found at commit {record['code']['commit'][:7]}."
    return formatting.markdown(head, rows, left=1) + "\n\n" + where
