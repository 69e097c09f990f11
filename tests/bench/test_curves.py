"""The figure of the recorded reproductions."""

from __future__ import annotations

from tools.figures.curves import curves


def record(name: str, bounds: list[float], *, finished: bool = True) -> dict[str, object]:
    best = 1 + bounds.index(max(bounds))
    return {
        "protocol": {"name": name},
        "seed": 0,
        "finished": finished,
        "validation_bounds": bounds,
        "best_epoch": best,
    }


def test_each_data_set_has_a_panel_and_a_scale_of_its_own() -> None:
    digits = [-230.0, *(-100 - 1 / (1 + epoch) for epoch in range(9))]
    faces = [-2600.0, *(-1850 - 10 / (1 + epoch) for epoch in range(9))]
    names = "standard-static-mnist", "vampprior-static-mnist", "standard-freyfaces"
    figure = curves(
        [record(names[0], digits), record(names[1], digits, finished=False), record(names[2], faces)],
    )
    panels = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["static-mnist", "freyfaces"]
    assert [len(panel.get_lines()) for panel in panels] == [4, 2]  # a curve and a dot for each run
    assert "not finished" in panels[0].get_legend().get_texts()[1].get_text()
    for panel, bounds in zip(panels, (digits, faces), strict=True):
        low, high = panel.get_ylim()
        assert low < bounds[2] < max(bounds) < high, "all but the first epochs are on the scale"
        assert low > bounds[0], "and those are not"
