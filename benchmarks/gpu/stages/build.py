"""Build the extension: in place on a GPU's machine, aside in a dry run."""

from __future__ import annotations

from ..stage import Context, Stage


def arguments(context: Context) -> list[str]:
    where = ["--build-lib", str(context.out / "build"), "--build-temp", str(context.out / "build" / "temp")]
    return ["setup.py", "-q", "build_ext", *(where if context.dry else ["--inplace"])]


STAGE = Stage("build", order=10, seconds=70, arguments=arguments)
