"""How the plots are drawn and written: style, labels, bytes that depend on the input alone.

matplotlib's object interface only, no pyplot and no state of the process. What is plotted is the
business of plots. Text comes from strangers: it is shortened, never read as mathematics, and what
leaves `svg` is parsed and written anew as XML.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import replace_file

__all__ = [
    "AFTER",
    "BEFORE",
    "GRID",
    "INK",
    "QUIET",
    "WIDTH_IN",
    "Axes",
    "Figure",
    "drawing",
    "label",
    "new_figure",
    "place_labels",
    "save",
    "svg",
]

BEFORE, AFTER = "#d55e00", "#0072b2"
INK, QUIET, GRID = "#1a1d21", "#5b626b", "#d4d7db"
_VARIABLES = {BEFORE: "before", AFTER: "after", INK: "ink", QUIET: "quiet", GRID: "grid"}
WIDTH_IN = 5.0
"""Narrow, so that the letters can still be read when the plot is as wide as a phone."""

_STYLE = {
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "figure.facecolor": "#ffffff",
    "font.size": 8.5,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.4,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "savefig.dpi": 200,
    "savefig.facecolor": "#ffffff",
    "svg.fonttype": "none",
    "svg.hashsalt": "safegene",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_OFFSETS_PT = tuple(
    (x * reach, y * reach)
    for reach in (1, 2)
    for x, y in ((7, 0), (-7, 0), (0, 8), (0, -8), (6, 7), (-6, 7), (6, -7), (-6, -7))
)

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # A letter that DejaVu lacks is drawn by the reader's own font in SVG.
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        yield


def drawing(draw: Callable[P, T]) -> Callable[P, T]:
    """`draw` in our style."""

    @functools.wraps(draw)
    def styled(*arguments: P.args, **options: P.kwargs) -> T:
        with _style():
            return draw(*arguments, **options)

    return styled


def new_figure(height_in: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, `WIDTH_IN` wide; legends may stand outside."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()


def label(text: str, most: int = 40) -> str:
    """`text` on one line of at most `most` characters that every XML reader accepts."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    # matplotlib leaves out of a legend what begins with an underscore.
    clean = re.sub(r"^_", "\u200b_", " ".join(clean.split()))
    if len(clean) <= most:
        return clean
    # Names of one family differ in their ends.
    tail = most // 3
    return f"{clean[: most - tail - 1].rstrip()}…{clean[-tail:].lstrip()}"


def _overlap(one: Any, other: Any) -> float:
    """Common area of two boxes in pixels²."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(wide, 0.0) * max(high, 0.0))


def _length_inside(box: Bbox, start: Any, end: Any) -> float:
    """How many pixels of the line from `start` to `end` lie in `box` (Liang and Barsky 1984)."""
    first, last = 0.0, 1.0
    for axis, (low, high) in enumerate(((box.x0, box.x1), (box.y0, box.y1))):
        step = end[axis] - start[axis]
        if abs(step) < 1e-9:
            if not low <= start[axis] <= high:
                return 0.0
            continue
        ends = sorted(((low - start[axis]) / step, (high - start[axis]) / step))
        first, last = max(first, ends[0]), min(last, ends[1])
    return max(last - first, 0.0) * math.dist(start, end)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def place_labels(
    figure: Figure,
    axes: Axes,
    names: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Write each text beside one of its points (x, y), where it hides the least of all else.

    `lines`, from (x, y) to (x, y), and all points should stay visible. Greedy, in the order given.
    """
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    strokes = [axes.transData.transform(line) for line in lines]
    marks = [axes.transData.transform(point) for _, points in names for point in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in marks]
    pixels = figure.dpi / 72
    for text, points in names:
        measured = axes.text(*points[0], text).get_window_extent()
        axes.texts[-1].remove()
        wide, high = measured.width, measured.height
        tries = []
        for rank, (point, (dx, dy)) in enumerate(product(points, _OFFSETS_PT)):
            x, y = axes.transData.transform(point)
            left = x + dx * pixels - wide * (0.5 - 0.5 * _sign(dx))
            below = y + dy * pixels - high * (0.5 - 0.5 * _sign(dy))
            box = Bbox.from_bounds(left, below, wide, high)
            hidden = sum(_overlap(box, other) for other in taken)
            hidden += 6 * sum(_length_inside(box, *stroke) for stroke in strokes)
            outside = wide * high - _overlap(box, frame)
            tries.append((hidden + 3 * outside + 4 * rank, rank, point, (dx, dy), box))
        _, _, point, (dx, dy), box = min(tries, key=lambda found: found[:2])
        taken.append(box)
        axes.annotate(
            text,
            point,
            (dx, dy),
            textcoords="offset points",
            ha=("right", "center", "left")[_sign(dx) + 1],
            va=("top", "center", "bottom")[_sign(dy) + 1],
            zorder=5,
        )


def _bytes(figure: Figure, form: str, ground: str = "#ffffff") -> bytes:
    data = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    with _style():
        figure.savefig(data, format=form, metadata=metadata, facecolor=ground)
    return data.getvalue()


def svg(figure: Figure, title: str) -> str:
    """`figure` as an <svg> element for a page: no prologue, no ids of its own but those it uses.

    `title` is what a screen reader says. Colours are CSS variables with the plain colour behind.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    data = _bytes(figure, "svg", "none")
    mark = "p" + hashlib.sha256(data).hexdigest()[:8] + "-"
    root = ElementTree.fromstring(data)
    # The one style rule in there would hold for the whole page; it goes to the element itself.
    for node in (*root.findall(f"{{{_SVG}}}metadata"), *root.iter(f"{{{_SVG}}}defs")):
        for part in node.findall(f"{{{_SVG}}}style"):
            node.remove(part)
        if node.tag.endswith("metadata") or not len(node):
            next(parent for parent in root.iter() if node in parent).remove(node)
    used = set(re.findall(r"""(?:url\(|xlink:href=")#([^")]+)""", data.decode()))
    for node in root.iter():
        own = node.attrib.pop("id", None)
        if own is not None and own in used:
            node.set("id", mark + own)
        for name, value in node.attrib.items():
            value = re.sub(
                r"^#(?=[^ ]+$)" if name == f"{{{_XLINK}}}href" else r"(?<=url\()#",
                f"#{mark}",
                value,
            )
            if name == "style":
                value = re.sub(r"'DejaVu Sans'[^;]*", "system-ui, sans-serif", value)
                for colour, variable in _VARIABLES.items():
                    value = value.replace(f": {colour}", f": var(--{variable}, {colour})")
            node.set(name, value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("class", "plot")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    heading = ElementTree.Element(f"{{{_SVG}}}title")
    heading.text = label(title, 200)
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def save(figure: Figure, path: Path) -> None:
    """Write `figure` on white, whole or not at all: PNG (200 dpi) or SVG, by the ending of `path`.

    Errors: ConfigError for another ending.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise ConfigError(f"{path}: a plot is written as .png or .svg; name the file so")
    replace_file(Path(path), _bytes(figure, form))
