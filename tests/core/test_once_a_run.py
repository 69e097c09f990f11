"""What a run of the tests makes once, its processes share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.once_a_run import once_a_run


def request_in(folder: Path, **config: object) -> Any:
    """Of a process of pytest whose own folder that is."""
    return SimpleNamespace(
        config=SimpleNamespace(**config),
        getfixturevalue={"tmp_path_factory": SimpleNamespace(getbasetemp=lambda: folder)}.__getitem__,
    )


def test_workers_of_a_run_share_and_runs_do_not(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> Path:
        made.append(folder / "file")
        made[-1].write_text("made")
        return made[-1]

    for run in ("run-1", "run-2"):
        for worker in ("gw0", "gw1"):
            (tmp_path / run / worker).mkdir(parents=True)
            request = request_in(tmp_path / run / worker, workerinput={})
            assert once_a_run(request, "thing", make) == made[-1] and made[-1].read_text() == "made"
    assert len(made) == 2 and once_a_run(request, "other", make) != made[1]
    for alone in ("run-3", "run-4"):  # without workers
        (tmp_path / alone).mkdir()
        assert once_a_run(request_in(tmp_path / alone), "thing", make).is_relative_to(tmp_path / alone)


def test_what_failed_is_made_again(tmp_path: Path) -> None:
    def fails(folder: Path) -> str:
        (folder / "half").touch()
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        once_a_run(request_in(tmp_path), "thing", fails)
    assert once_a_run(request_in(tmp_path), "thing", lambda folder: "whole") == "whole"
