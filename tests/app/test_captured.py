"""Training as on a GPU, with every step captured in name: the same numbers, also after a stop and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.capture import capture_in_name

from .conftest import TINY, Cli

OPTIONS = {
    "vamp": [],
    "iwae": ["--bound", "iwae", "--samples", "3"],
    "exemplar": ["--prior", "exemplar", "--chunk-size", "100"],
    "binarised": ["--binarize"],
}
LAST, VALIDATION = [4], [8, 36]  # the last batch of an epoch's 64 images in 20s; the validation images


def history(folder: str) -> list[dict[str, Any]]:
    lines = json.loads((Path(folder) / "results.json").read_text())["history"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.usefixtures("tiny_npz")
@pytest.mark.parametrize("name", OPTIONS)
def test_captured_training_has_the_same_numbers(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS[name]
    command = ["train", "--data", "tiny.npz", *TINY, "--batch-size", "20", "--learning-rate", "0.0009765625", *options]
    assert cli(*command, "--out", "plain")[0] == 0
    shapes = capture_in_name(monkeypatch)
    assert cli(*command, "--out", "captured")[0] == 0
    # An exemplar prior's steps encode in chunks, which is not captured; evaluation reads what they have encoded.
    assert shapes == ([VALIDATION] if name == "exemplar" else [[20], LAST, VALIDATION])
    assert history("captured") == history("plain")
    assert cli("train", "--out", "captured", "--resume", "--epochs", "3")[0] == 0
    assert cli(*command, "--out", "plain", "--overwrite", "--epochs", "3")[0] == 0
    assert history("captured") == history("plain")
