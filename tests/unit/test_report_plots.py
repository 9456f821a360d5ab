"""Plots: what is drawn is what was given, hostile names stay text, same input gives same bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from report_files import share

from safegene_vllm.errors import ConfigError
from safegene_vllm.report import plots
from safegene_vllm.report.figure import save, svg
from safegene_vllm.report.plots import Bar, Point

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert('x')</script> & \"q\" ]]> --> $x^{"
BARS = [
    Bar("acme", "before", share(0.93)),
    Bar("acme", "after", share(0.03)),
    Bar("globex", "before", share(0.5)),
    Bar("globex", "after", share(0.0)),
    Bar("globex", "uniform", share(0.25)),
]
POINTS = [
    Point("acme", "before", share(0.91), share(0.93)),
    Point("acme", "after", share(0.9), share(0.03)),
    Point("globex", "before", share(0.7), share(0.5)),
    Point("globex", "after", share(0.69), share(0.02)),
    Point("globex", "uniform", share(0.6), share(0.25)),
    Point("parent", "parent", share(0.55), share(0.01)),
]
SCORES = {0: 0.1, 1: 0.9, 2: 0.8, 3: -0.2}
COEFFICIENTS = {"acme": [0.0, 0.5, 1.5, 0.0], "globex": [0.0, 0.0, -1.0, 0.0]}


def renamed(name: str) -> list[str]:
    """One SVG of each kind in which every name is `name`."""
    return [
        svg(figure, name)
        for figure in (
            plots.draw_rates(
                [Bar(name, name, share(0.4)), Bar(name, "after", share(0.1))], what=f"rate\n{name}"
            ),
            plots.draw_rates([Bar(name, "before", share(0.4))], what=name, parent=share(0.2)),
            plots.draw_safety_utility(
                [Point(name, state, share(0.4), share(0.3)) for state in ("before", "after", name)],
                accuracy=name,
                attack=name,
            ),
            plots.draw_layer_scores(SCORES, [1], what=name),
            plots.draw_coefficients({name: [0.0, 1.0]}),
        )
    ]


@cache
def drawn() -> list[Figure]:
    """One figure of each kind; shared, so leave them as they are."""
    return [
        plots.draw_rates(BARS, what="attack success\nstrings:opening", parent=share(0.1)),
        plots.draw_safety_utility(POINTS),
        plots.draw_layer_scores(SCORES, [1, 2]),
        plots.draw_coefficients(COEFFICIENTS),
    ]


def rectangles(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def color(figure_color: Any) -> str:
    return str(matplotlib.colors.to_hex(figure_color))


# What is drawn


def test_bars_are_as_long_as_the_rates_and_grouped_by_tenant() -> None:
    figure = plots.draw_rates(BARS, what="x")
    bars = rectangles(figure)
    assert [bar.get_width() for bar in bars] == [0.93, 0.03, 0.5, 0.0, 0.25]
    places = [bar.get_y() for bar in bars]
    steps = [round(b - a, 6) for a, b in pairwise(places)]
    assert steps[1] > steps[0] == steps[2] == steps[3]
    assert [color(bar.get_facecolor()) for bar in bars[:2]] == ["#d55e00", "#0072b2"]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["acme", "globex"]


def test_error_bars_are_the_intervals() -> None:
    axes = plots.draw_rates(BARS[:1], what="x").axes[0]
    across = [sorted(line.get_xdata()) for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert across == [pytest.approx([0.88, 0.98])]


def test_the_parent_is_a_line_with_a_band() -> None:
    axes = plots.draw_rates(BARS, what="x", parent=share(0.1)).axes[0]
    assert any(list(line.get_xdata()) == [0.1, 0.1] for line in axes.lines)
    band = axes.patches[-1]
    assert (band.get_x(), band.get_width()) == pytest.approx((0.05, 0.1))
    alone = plots.draw_rates(BARS, what="x").axes[0]
    assert len(alone.patches) == len(BARS)


def test_no_number_stands_on_the_line_of_the_parent() -> None:
    figure = plots.draw_rates([Bar("acme", "after", share(0.02))], what="x", parent=share(0.1))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    number = next(text for text in axes.texts if text.get_text() == "2.0 %").get_window_extent()
    line = axes.transData.transform((0.1, 0))[0]
    assert not number.x0 <= line <= number.x1


def test_arrows_point_from_before_to_after() -> None:
    axes = plots.draw_safety_utility(POINTS).axes[0]
    arrows = [text for text in axes.texts if text.arrow_patch is not None]
    ends = [(*arrow.get_position(), *arrow.xy) for arrow in arrows]
    assert ends == [(0.91, 0.93, 0.9, 0.03), (0.7, 0.5, 0.69, 0.02)]


def test_every_point_is_marked_and_every_tenant_named() -> None:
    axes = plots.draw_safety_utility(POINTS).axes[0]
    marks = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() not in ("None", "") and len(line.get_xdata())
    }
    assert marks == {(point.accuracy.rate, point.attack.rate) for point in POINTS}
    assert sorted(t.get_text() for t in axes.texts if t.get_text()) == ["acme", "globex", "parent"]


def test_selected_layers_are_filled_and_others_are_not() -> None:
    bars = rectangles(plots.draw_layer_scores(SCORES, [1, 2]))
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars}
    assert heights == SCORES
    filled = [round(bar.get_x() + 0.4) for bar in bars if bar.get_facecolor()[3] > 0]
    assert filled == [1, 2]


def test_cells_are_deep_where_coefficients_are_large() -> None:
    cells = [r for r in rectangles(plots.draw_coefficients(COEFFICIENTS)) if r.get_alpha()]
    seen = {
        (round(cell.get_y() + 0.38), round(cell.get_x() + 0.46)): (
            color(cell.get_facecolor()),
            cell.get_alpha(),
        )
        for cell in cells
    }
    assert set(seen) == {(0, 1), (0, 2), (1, 2)}
    assert seen[0, 2] == ("#0072b2", 1.0)
    assert seen[0, 1][1] < seen[1, 2][1] < 1.0
    assert seen[1, 2][0] == "#d55e00"


# How it reads


@cache
def wordy() -> list[Figure]:
    """Figures with long names, many states and many tenants."""
    names = [f"a-very-long-name-of-tenant-{number}" for number in range(7)]
    states = ["before", "after", "the whole vector at one", "safe lora, projected", "no vector"]
    bars = [Bar(n, s, share(1.0 if s == "before" else 0.1)) for n, s in product(names, states)]
    points = [
        Point(name, state, share(0.5 + 0.06 * i), share(0.9 if state == "before" else 0.06 * i))
        for i, name in enumerate(names)
        for state in states[:2]
    ]
    return [
        plots.draw_rates(bars, what="attack\nclassifier:" + "long" * 20, parent=share(0.02)),
        plots.draw_safety_utility(points),
        plots.draw_coefficients({name: [1.0] * 80 for name in names}),
        plots.draw_layer_scores({layer: layer / 80 for layer in range(80)}, range(20, 60)),
    ]


@pytest.mark.parametrize("number", range(4))
def test_nothing_written_runs_over_the_edge(number: int) -> None:
    figure = wordy()[number]
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    axes = figure.axes[0]
    ticks = {
        tick.label1: view[0] <= tick.get_loc() <= view[1]
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for view in [sorted(axis.get_view_interval())]
    }
    every = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    written = [text for text in every if ticks.get(text, True)]
    assert len(written) > 8
    for text in written:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= width + 1, text.get_text()
        assert box.y0 >= -1 and box.y1 <= height + 1, text.get_text()


def test_names_in_the_plot_do_not_cover_each_other() -> None:
    figure = wordy()[1]
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]
    assert len(boxes) == 7
    for number, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:number])


def test_one_look_for_each_of_many_states() -> None:
    states = [f"state {number}" for number in range(9)]
    bars = [Bar("acme", state, share(0.5)) for state in [*states, "parent"]]
    assert len(rectangles(plots.draw_rates(bars, what="x"))) == 10
    points = [Point("acme", state, share(0.5), share(0.5)) for state in states]
    axes = plots.draw_safety_utility(points).axes[0]
    looks = {(li.get_marker(), li.get_color()) for li in axes.lines if not len(li.get_xdata())}
    assert len(looks) == 9


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.draw_rates([], what="x"),
        lambda: plots.draw_safety_utility([]),
        lambda: plots.draw_safety_utility([Point("a", "after", share(1.0), share(0.0))]),
        lambda: plots.draw_layer_scores({}, []),
        lambda: plots.draw_layer_scores({}, [3]),
        lambda: plots.draw_coefficients({}),
        lambda: plots.draw_coefficients({"a": [0.0, 0.0]}),
        lambda: plots.draw_coefficients({"a": []}),
    ],
)
def test_little_to_show_is_still_a_plot(draw: Callable[[], Figure]) -> None:
    assert ElementTree.fromstring(svg(draw(), "x")).tag == f"{SVG}svg"


# Untrusted text


@pytest.mark.parametrize(
    "name", [NASTY, "$\\frac{1}{$", "_hidden", "a\x00\x1b\ud800\nb", "", "日本"]
)
def test_names_stay_text(name: str) -> None:
    for text in renamed(name):
        root = ElementTree.fromstring(text)
        tags = {node.tag.removeprefix(SVG) for node in root.iter()}
        assert tags <= {"svg", "title", "defs", "g", "path", "clipPath", "rect", "text", "use"}
        for node in root.iter():
            assert not any(key.lower().startswith("on") for key in node.attrib)


def test_a_name_is_written_as_it_is() -> None:
    for text in renamed("<b>&$\"'"):
        written = ["".join(node.itertext()) for node in ElementTree.fromstring(text).iter()]
        assert any("<b>&$\"'" in words for words in written)
        assert "<b>" not in text


def test_plots_of_one_page_share_no_names_and_refer_to_their_own() -> None:
    seen: set[str] = set()
    for text in (svg(figure, "x") for figure in drawn()):
        own = set(re.findall(r'\bid="([^"]*)"', text))
        refers = set(re.findall(r'(?:url\(|href=")#([^")]*)', text))
        assert own == refers
        assert not own & seen
        seen |= own
    assert seen


def test_nothing_is_fetched() -> None:
    for text in [*renamed("a"), *(svg(figure, "x") for figure in drawn())]:
        assert set(re.findall(r"https?://[^\s\"']*", text)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert "<style" not in text and "data:" not in text


def test_the_legend_is_one_row_where_it_fits() -> None:
    def rows(figure: Figure) -> int:
        figure.draw_without_rendering()
        return len({round(t.get_window_extent().y0) for t in figure.legends[0].get_texts()})

    assert rows(drawn()[0]) == 1
    assert rows(wordy()[0]) > 1


def test_long_names_stay_different() -> None:
    figure = wordy()[2]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(set(names)) == 7 and all(len(name) <= 20 for name in names)


# Bytes


def test_colors_are_variables_on_a_page_and_plain_in_a_file(tmp_path: Path) -> None:
    figure = plots.draw_rates(BARS, what="x")
    assert "var(--before, #d55e00)" in svg(figure, "x")
    save(figure, tmp_path / "a.svg")
    written = (tmp_path / "a.svg").read_text()
    assert "var(" not in written and "#d55e00" in written


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.SVG", b"<?xml")])
def test_saved_files(tmp_path: Path, name: str, start: bytes) -> None:
    for figure in drawn():
        save(figure, tmp_path / "sub" / name)
        assert (tmp_path / "sub" / name).read_bytes().startswith(start)


def test_other_endings_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        save(drawn()[0], tmp_path / "a.pdf")


def test_the_same_bytes_in_every_process_and_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import hashlib, sys, pathlib\n"
        "from test_report_plots import drawn, save, svg\n"
        "for number, figure in enumerate(drawn()):\n"
        "    for form in ('png', 'svg'):\n"
        "        path = pathlib.Path(sys.argv[1]) / f'{number}.{form}'\n"
        "        save(figure, path)\n"
        "        print(hashlib.sha256(path.read_bytes()).hexdigest())\n"
        "    print(hashlib.sha256(svg(figure, 'x').encode()).hexdigest())\n"
        "print(sorted({'matplotlib.pyplot', 'torch'} & set(sys.modules)))\n"
    )
    # Another day, another order of sets, another taste of the user's.
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.grid: True\nsvg.hashsalt: other\n")
    outputs = []
    for seed, settings in (("1", {}), ("2", {"MATPLOTLIBRC": str(tmp_path)})):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "unit")]
                ),
                "PYTHONHASHSEED": seed,
                **settings,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[-1] == "[]"


def test_the_users_settings_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    svg(plots.draw_rates(BARS, what="x"), "x")
    assert dict(matplotlib.rcParams) == before
