"""A terminal of 40 columns: help, progress and tables that can be read."""

from __future__ import annotations

import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.run.comparison import Row
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.protocol import protocol_names, read_protocol
from fastvae.app.show import progress
from fastvae.app.show.progress import counting_progress, training_progress
from fastvae.app.show.result_tables import comparison_tables, protocols_table
from fastvae.app.show.width import NARROW

from .conftest import Cli

MEASURES = {"bound": -123.45, "elbo": -123.46, "reconstruction": -101.23, "kl": 22.23}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "compare", "score", "plan", "info", ""])
def test_help(cli: Cli, command: str) -> None:
    code, text, error = cli(*command.split(), "--help")
    assert code == 0, error
    assert max(map(len, text.splitlines())) <= 40 and "…" not in text
    if command == "train":
        words = " ".join(text.split())
        assert "--learning-rate" in words and "--out DIR The run's folder. [required]" in words
        assert "Passes over the training images, at most. (default 100; digits 250)" in words
    if command == "score":
        assert "digits" not in text and "Training" not in text
    if not command:
        assert re.search(r"\nevaluate\n +Measure the best model", text)


@pytest.mark.parametrize("columns", [69, 80, 85, 86, 120])
@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "score", "reproduce"])
def test_help_has_whole_names_at_any_width(
    cli: Cli, command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, text, error = cli(command, "--help")
    assert code == 0, error
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    assert ("│" in text) == (columns >= (86 if command == "train" else 70))


def test_a_wide_terminal_has_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, text, _ = cli("train", "--help")
    assert any("--epochs" in line and "Passes over the training images" in line for line in text.splitlines())


def console(width: int) -> Console:
    return Console(file=StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def lines(terminal: Console) -> list[str]:
    assert isinstance(terminal.file, StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_progress_of_training(width: int, bound: str) -> None:
    split = Split(torch.zeros(200, 9))
    data = Dataset("tiny", "made here", split, split, split, image_shape=(3, 3), kind="binary")
    config = TrainConfig(bound=bound, num_samples=50 if bound == "iwae" else 1)  # type: ignore[arg-type]
    shown = console(width)
    with training_progress(shown, config, data, 1, "standard, seed 0:") as watchers:
        watchers.batch(12, 1)
        watchers.epoch({"epoch": 12, "beta": 1, "train": MEASURES, "validation": MEASURES, "seconds": 1})  # type: ignore[typeddict-item]
    told = lines(shown)
    assert max(map(len, told)) <= width and not any("…" in line for line in told)
    if width < 120:
        assert any("standard, seed 0: epoch 12/100" in line for line in told)
        assert any(f"{bound.upper()} -123.45, KL 22.23" in line for line in told)
    elif bound == "elbo":
        assert any("ELBO -123.46 = reconstruction -101.23 - KL 22.23" in line for line in told)


@pytest.mark.parametrize("width", [40, 100])
def test_progress_of_evaluation(width: int) -> None:
    shown = console(width)
    with counting_progress(shown, "standard, seed 0: evaluating", 10000) as on_images:
        on_images(1234)
    told = lines(shown)
    assert max(map(len, told)) <= width and not any("…" in line for line in told)
    assert any("1234/10000 images" in " ".join(line.split()) for line in told)


def test_training_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a protocol of 2,000 epochs, of which each takes half a minute, is not empty for hours."""
    split = Split(torch.zeros(200, 9))
    data = Dataset("tiny", "made here", split, split, split, image_shape=(3, 3), kind="binary")
    clock = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    shown = Console(file=StringIO())
    with training_progress(shown, TrainConfig(epochs=2000), data, 1, "here:") as watchers:
        for epoch in [1, 2, 3, 4, 400]:
            clock[0] += 30.0 if epoch < 400 else 1.0
            watchers.epoch({"epoch": epoch, "beta": 1, "train": MEASURES, "validation": MEASURES, "seconds": 30})  # type: ignore[typeddict-item]
    told = [line.split(":")[1] for line in shown.file.getvalue().splitlines() if line]
    assert told == [" epoch 2/2000", " epoch 4/2000", " epoch 400/2000"]


def test_progress_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of a job of hours tells how far it is, and one of a short job nothing."""
    for seconds, lines_told in (
        (3600.0, []),
        (0.0, ["scoring: 1,234 of 10,000 rows", "scoring: 10,000 of 10,000 rows"]),
    ):
        monkeypatch.setattr(progress, "SECONDS", seconds)
        shown = Console(file=StringIO())
        with counting_progress(shown, "scoring", 10000, "rows") as on_rows:
            on_rows(1234)
            on_rows(10000)
        assert [line for line in shown.file.getvalue().splitlines() if line] == lines_told


@pytest.mark.parametrize("width", [40, 80])
def test_tables_of_a_comparison(width: int) -> None:
    row = Row("standard", [-122.5, -121.0], [-131.0, -129.0], [5.0, 6.0], [40, None], [0.1, 0.2])
    shown = console(width)
    for table in comparison_tables([row, row], "static-mnist: 10000 test images", narrow=width == 40):
        shown.print(table)
    told = lines(shown)
    assert max(map(len, told)) <= width and not any("…" in line for line in told)
    text = " ".join(" ".join(told).split())
    for value in ("-121.75 +- 1.06", "-130.00 +- 1.41", "5.50 +- 0.71", "0.150"):
        assert text.count(value) == 2
    assert "+- is the standard deviation over 2 seeds" in text


@pytest.mark.parametrize("width", [40, 80])
def test_protocols(width: int) -> None:
    terminal = console(width)
    terminal.print(protocols_table([read_protocol(name) for name in protocol_names()], narrow=width < NARROW))
    text = "\n".join(lines(terminal))
    assert all(name in text for name in protocol_names()) and "-85.57" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= width
