"""Figures: the numbers they show, who is left out, what is refused, and the files the command writes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_records import make
from matplotlib.axes import Axes
from matplotlib.text import Text

from avalanche_fmlora.cli import main
from avalanche_fmlora.results.figures import (
    KINDS,
    accuracy_against_cost,
    accuracy_against_parameters,
    accuracy_against_trained_parameters,
    accuracy_matrix,
    accuracy_over_experiences,
    as_bytes,
    draw,
    forgetting,
    heat_maps,
    rank,
    save,
)
from avalanche_fmlora.results.figures.style import SCREEN_DPI, WIDTH_IN, series_of
from avalanche_fmlora.results.figures.tradeoffs import trained_an_experience
from avalanche_fmlora.results.grouping import runs_of
from avalanche_fmlora.results.record import Record, write_record


def record(method: str, matrix: list[list[float | None]], order: int = 0, **changes: Any) -> Record:
    """A run with this accuracy matrix."""
    made = make(method=method, order=order, **changes)
    count = len(matrix)
    made["accuracy_matrix"] = matrix
    made["benchmark"]["experience_names"] = [str(t) for t in range(count)]
    joint = matrix[0][0] is None
    row = made["experiences"][-1] | ({"name": "all"} if joint else {})
    made["experiences"] = [{**row, "experience": t} for t in range(1 if joint else count)]
    return made


def several() -> list[Record]:
    return [
        record("a", [[1.0, None], [0.5, 0.9]]),
        record("a", [[0.8, None], [0.3, 0.7]], order=1),
        record("joint", [[None, None], [0.9, 0.95]]),
    ]


def lines(axes: Axes) -> dict[str, list[float]]:
    """Line styles and data of the lines of a figure."""
    return {str(line.get_marker()): list(map(float, line.get_ydata())) for line in axes.lines}  # type: ignore[arg-type]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_accuracy_is_the_mean_over_what_was_seen() -> None:
    figure = accuracy_over_experiences([*several(), make(method="b", error="boom")])
    axes = figure.axes[0]
    assert lines(axes)["s"] == pytest.approx([0.9, 0.6])
    assert lines(axes)["None"] == pytest.approx([0.925, 0.925]), "joint training is a level line"
    assert texts(axes) == ["joint", "a"]
    (band,) = axes.collections
    std = np.std([0.7, 0.5], ddof=1)
    low, high = (f(p[1] for p in band.get_paths()[0].vertices if p[0] == 2) for f in (min, max))  # type: ignore[union-attr]
    assert (low, high) == pytest.approx((0.6 - std, 0.6 + std))
    assert figure.get_figwidth() == WIDTH_IN


def test_forgetting_over_experiences_is_the_metric_at_the_end() -> None:
    matrix = [[0.9, None, None], [0.6, 0.8, None], [0.7, 0.5, 1.0]]
    made = record("a", matrix)
    made["metrics"]["forgetting"] = 0.25
    above, below = forgetting([made]).axes
    # After 2: 0.9 - 0.6. After 3: the best so far is kept, (0.9 - 0.7 + 0.8 - 0.5) / 2.
    assert lines(above)["s"] == pytest.approx([0.3, 0.25])
    assert texts(below) == ["25.0"]
    with pytest.raises(ValueError, match="at least two experiences"):
        forgetting(_without_forgetting())


def _without_forgetting() -> list[Record]:
    made = several()[2]
    made["metrics"]["forgetting"] = None
    return [made]


def test_matrix_shows_means_and_numbers() -> None:
    figure = accuracy_matrix(several())
    np.testing.assert_allclose(np.ma.filled(figure.axes[0].images[0].get_array(), np.nan), [[0.9, np.nan], [0.4, 0.8]])
    assert texts(figure.axes[0]) == ["90", "40", "80"]
    panels = accuracy_matrix([*several(), record("b", [[0.1, None], [0.2, 0.3]])])
    assert [axes.get_title() for axes in panels.axes[:2]] == ["a", "b"]
    assert panels.axes[0].images[0].get_clim() == panels.axes[1].images[0].get_clim() == (0.1, 0.9)
    with pytest.raises(ValueError, match="joint training"):
        accuracy_matrix(several()[2:])


def test_ranks_against_what_they_were_chosen_by() -> None:
    made = record("fm_lora", [[0.9, None], [0.6, 0.8]])
    made["experiences"][0] |= {"rank": 8, "complexity": 0.3, "similarity": 0.1, "ranks_per_layer": [8, 8]}
    made["experiences"][1] |= {"rank": 16, "complexity": 0.6, "similarity": None, "ranks_per_layer": [8, 8]}
    other = record("seq_lora", [[0.9, None], [0.6, 0.8]])
    for row in other["experiences"]:
        row["complexity"] = None
    figure = rank([made, other])
    over, complexity, similarity = figure.axes
    assert lines(over) == {"None": [8.0, 16.0], "o": []}, "the mark alone is for the legend"
    assert not figure.legends, "a fixed rank is not chosen"
    assert np.asarray(complexity.collections[0].get_offsets()).tolist() == [[0.3, 8], [0.6, 16]]
    assert np.asarray(similarity.collections[0].get_offsets()).tolist() == [[0.1, 8]]
    made["experiences"][1]["ranks_per_layer"] = [8, 16]
    heat_map = next(axes for axes in rank([made]).axes if axes.images)
    assert np.asarray(heat_map.images[0].get_array()).tolist() == [[8, 8], [8, 16]]
    with pytest.raises(ValueError, match="choose a rank"):
        rank([other])


@pytest.mark.parametrize(
    ("figure", "x"),
    [
        (accuracy_against_parameters, 1001.0),
        (accuracy_against_trained_parameters, 9.5),
        (accuracy_against_cost, 2.0),
    ],
)
def test_accuracy_against_costs(figure: Any, x: float) -> None:
    records = [make(0.5, order=o) for o in (0, 1)] + [make(0.75, method="joint", joint=True)]
    for made in records:
        made["experiences"][-1]["trained_parameters"] = 9
    zero = make(0.25, method="ncm")
    zero["experiences"][-1]["stored_parameters"] = 0
    axes = figure([*records, zero]).axes[0]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if str(line.get_marker()) not in ("None", "")]
    assert (x, 0.375) in points
    assert sorted(texts(axes)) == ["fmlora", "joint", "ncm"]
    assert axes.get_xscale() == ("symlog" if x > 100 else "log"), "zero has its place"


def test_names_beside_points_are_in_the_panel_and_cover_neither_points_nor_each_other() -> None:
    figure = accuracy_against_cost(close(9))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    frame, boxes = axes.get_window_extent(), [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 9
    assert all(frame.x0 - 1 < box.x0 and box.x1 < frame.x1 + 1 for box in boxes)
    assert all(frame.y0 - 1 < box.y0 and box.y1 < frame.y1 + 1 for box in boxes)
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    points = [line.get_xydata()[0] for line in axes.lines if str(line.get_marker()) not in ("None", "")]
    places = axes.transData.transform(points)
    assert len(places) == 9
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_many_points_have_numbers_that_a_legend_below_explains() -> None:
    figure = accuracy_against_cost(close(12))
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "1  method_11", "the most accurate first"
    assert names[-1] == "12  method_0"
    by_colour = {text.get_text(): text.get_color() for text in axes.texts}
    handles = {name.split()[0]: handle.get_color() for name, handle in zip(names, legend.legend_handles, strict=True)}  # type: ignore[union-attr]
    assert by_colour == handles
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0
    few = accuracy_against_cost(close(10))
    few.draw_without_rendering()
    assert not few.legends
    heights = [a.get_window_extent().height for a in (axes, few.axes[0])]
    assert heights[0] > 0.9 * heights[1], "the figure grows, the panel does not shrink"


def test_trained_parameters_of_old_records_are_all_trainable_ones() -> None:
    old = make(0.5)
    for row in old["experiences"]:
        row["trained_parameters"] = None
    assert trained_an_experience(old) == 10.5


def close(count: int, label: str = "") -> list[Record]:
    """Records of methods whose accuracies differ little."""
    records = [record(f"method_{k}{label}", [[0.9, None], [0.5, 0.5 + k / 1000]]) for k in range(count)]
    for k, made in enumerate(records):
        made["metrics"]["final_average_accuracy"] = 0.5 + k / 2000
    return records


@pytest.mark.parametrize("count", [10, 30])
@pytest.mark.parametrize("draw", [accuracy_over_experiences, forgetting])
def test_names_at_the_side_do_not_overlap(draw: Any, count: int) -> None:
    records = close(count, " with a name of two lines" if count > 10 else "")
    figure = draw(records)
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 - 2 for below, above in pairwise(boxes))
    axes = figure.axes[0].get_window_extent()
    assert boxes[0].y0 > axes.y0 - 3
    assert boxes[-1].y1 < axes.y1 + 3
    looks = [one.look[1:] for one in series_of(records)]
    assert len(set(looks)) == len(looks), "told apart without colour"


@pytest.mark.parametrize("kind", list(KINDS))
def test_long_names_and_many_experiences_leave_room_for_the_axes(kind: str) -> None:
    count, records = 30, []
    for k in range(3):
        label = f"{k}: a label that says much more than any figure has room for, in many words"
        matrix = [[0.9 - 0.02 * (t - i) if i <= t else None for i in range(count)] for t in range(count)]
        records += [record("fm_lora", matrix, order=o, label=label, options={"k": k}) for o in (0, 1)]
    figure = KINDS[kind](records)
    figure.draw_without_rendering()  # a collapsed layout is a warning, so an error here
    assert all(axes.get_window_extent().width > 20 for axes in figure.axes if axes.axison and axes.get_label() == "")
    shown = {axes.get_title() for axes in figure.axes} | {text for axes in figure.axes for text in texts(axes)}
    assert kind == "rank" or any(text.endswith("…") for text in shown)


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    paths = [save(accuracy_over_experiences(several()), tmp_path / name / "a.svg") for name in "xy"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    pngs = [as_bytes(accuracy_over_experiences(several()), "png") for _ in range(2)]
    assert pngs[0] == pngs[1]
    assert int.from_bytes(pngs[0][16:20], "big") == round(300 * WIDTH_IN)
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf"):
        save(accuracy_over_experiences(several()), tmp_path / "a.jpg")


def test_a_notebook_shows_a_figure_as_wide_as_its_text() -> None:
    figure = accuracy_over_experiences(several())
    png = figure._repr_png_()  # type: ignore[attr-defined]
    assert int.from_bytes(png[16:20], "big") == round(SCREEN_DPI * WIDTH_IN)
    assert figure.dpi == SCREEN_DPI, "what IPython goes by, once pyplot is imported"


def test_matrices_of_ones_own_are_drawn_as_those_of_records() -> None:
    matrix = [[0.9, None], [0.5, 0.7]]
    (own, *_), (of_record, *_) = heat_maps({"mine": matrix}).axes, accuracy_matrix([record("a", matrix)]).axes
    assert texts(own) == texts(of_record) == ["90", "50", "70"]
    assert (own.get_title(), of_record.get_title()) == ("mine", "a, n = 1")
    for axes in (own, of_record):
        (image,) = axes.images
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), np.array(matrix, float))
        assert image.get_clim() == (0.5, 0.9)


def test_what_is_not_known_has_no_number() -> None:
    nan = float("nan")
    assert texts(heat_maps({"mine": [[0.5, nan], [nan, 0.7]]}).axes[0]) == ["50", "70"]


def test_one_experience_has_one_tick() -> None:
    one = record("fm_lora", [[0.5]])
    for figure in (accuracy_over_experiences([one]), rank([one])):
        assert list(figure.axes[0].get_xticks()) == [1]


def test_ranks_of_many_variants_are_drawn_where_they_are_and_named_with_their_marks() -> None:
    figure = rank([make(method="fm_lora", options={"rank": 4 + k}) for k in range(13)])
    for name in ("complexity", "similarity to the past"):
        (axes,) = (a for a in figure.axes if a.get_xlabel() == name)
        drawn = {float(y) for points in axes.collections for _, y in np.array(points.get_offsets())}
        assert drawn == ({8.0, 16.0} if name == "complexity" else {16.0})
        assert max(drawn) < axes.get_ylim()[1]
    marks = {str(handle.get_marker()) for handle in figure.legends[0].legend_handles}  # type: ignore[union-attr]
    assert len(marks) > 10


def test_ticks_of_many_experiences_begin_at_the_first() -> None:
    count = 50
    matrix = [[0.5 if i <= t else None for i in range(count)] for t in range(count)]
    made = record("fm_lora", matrix)
    assert list(accuracy_over_experiences([made]).axes[0].get_xticks()) == [1, *range(5, 51, 5)]
    assert next(iter(forgetting([made]).axes[0].get_xticks())) == 2


def test_matrices_side_by_side_share_a_scale_and_have_numbers_where_they_fit() -> None:
    left, right, bar = heat_maps({"a": [[0.9, None], [0.1, 0.7]], "b": [[0.8, None], [0.5, 0.6]]}).axes
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0.1, 0.9)
    assert (texts(left), texts(right)) == (["90", "10", "70"], ["80", "50", "60"])
    assert bar.get_ylabel() == "accuracy [%]"
    assert not any(texts(axes) for axes in heat_maps(dict.fromkeys("ab", np.tri(7) / 2)).axes)
    for wrong in ({}, {"a": [[0.5]], "b": [[0.5, 0.5], [0.5, 0.5]]}):
        with pytest.raises(ValueError, match="of one shape"):
            heat_maps(wrong)


@pytest.mark.parametrize("kind", list(KINDS))
def test_records_of_several_protocols_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="folder of its own"):
        KINDS[kind]([make(), make(benchmark={"name": "birds"})])
    with pytest.raises(ValueError, match=r"folder of its own"):
        KINDS[kind]([make(), make(order=1, training={"epochs": 9})])
    with pytest.raises(ValueError, match="none"):
        KINDS[kind]([make(error="boom")])


def test_draw_makes_a_figure_for_each_protocol() -> None:
    mixed = [make(), make(benchmark={"name": "birds"}), make(training={"epochs": 9})]
    names = list(draw(mixed, ["accuracy"]))
    assert [name.rsplit("-", 1)[0] for name in names] == ["accuracy", "accuracy-glyphs", "accuracy-glyphs"]
    assert list(draw([make()], ["accuracy", "cost"])) == ["accuracy", "cost"]
    assert "Expected finished records" in str(draw([make(error="boom")], ["accuracy"])["accuracy"])
    made = make(method="ncm")
    made["experiences"] = [{**row, "rank": None} for row in made["experiences"]]
    assert "choose a rank" in str(draw([made], ["rank"])["rank"])


def test_the_command_writes_what_was_asked_for(tmp_path: Path) -> None:
    whitened = make(method="ncm", label="ncm, whitened rows", order=1)
    for one in (make(method="fm_lora"), make(method="ncm"), make(method="joint", joint=True), whitened):
        write_record(one, tmp_path / "records")

    def plot(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["plot", str(tmp_path), *arguments])

    assert plot().stdout.strip() == str(tmp_path / "accuracy.png")
    assert plot("--kind", "all", "--to", str(tmp_path / "f"), "--format", "svg", "--methods", "fm_lora").exit_code == 0
    assert {p.name for p in (tmp_path / "f").iterdir()} == {f"{kind}.svg" for kind in KINDS}
    assert plot("--kind", "matrix", "--to", str(tmp_path / "m.pdf")).exit_code == 0
    assert (tmp_path / "m.pdf").read_bytes().startswith(b"%PDF")
    assert plot("--kind", "matrix", "--methods", 'fm_lora, "ncm, whitened rows"').exit_code == 0
    write_record(make(method="fm_lora", options={"rank": 8}), tmp_path / "grid" / "records")
    write_record(make(method="fm_lora", options={"rank": 4}), tmp_path / "grid" / "records")
    for name in ("rank=8", "fm_lora rank=8"):  # as tables show it
        assert CliRunner().invoke(main, ["plot", str(tmp_path / "grid"), "--methods", name]).exit_code == 0
    for arguments, message in (
        (["--kind", "all", "--to", "all.png"], f"Expected a folder for {len(KINDS)} figures"),
        (["--to", "a.png", "--format", "svg"], "to end in .svg"),
        (["--to", "a.jpg"], "to end in .png, .svg or .pdf, or to name a folder, but got a.jpg"),
        (["--methods", "l2p"], "to be among ['fm_lora', 'joint', 'ncm', 'ncm, whitened rows'] but got ['l2p']"),
        (["--kind", "matrix", "--methods", "joint"], "joint training is only at the end"),
    ):
        wrong = plot(*arguments)
        assert (wrong.exit_code, message in wrong.stderr) == (1, True), wrong.stderr


def test_a_label_that_begins_with_the_method_is_the_name() -> None:
    labels = (None, "ncm, whitened rows", "with whitened rows")
    records = [make(method="ncm", label=label, order=order) for order, label in enumerate(labels)]
    assert {run.name for run in runs_of(records)} == {"ncm", "ncm, whitened rows", "ncm with whitened rows"}
