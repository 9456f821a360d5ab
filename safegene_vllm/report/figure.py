"""Style, labels and output of plots; bytes depend on the input alone.

Only matplotlib's object interface: no pyplot and no state of the process. Texts are untrusted: they
are shortened, never parsed as mathematics, and `svg` parses and rewrites its output as XML.
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

BEFORE, AFTER = "#d55e00", "#0072b2"
INK, QUIET, GRID = "#1a1d21", "#5b626b", "#d4d7db"
_VARIABLES = {BEFORE: "before", AFTER: "after", INK: "ink", QUIET: "quiet", GRID: "grid"}
WIDTH_IN = 5.0
"""Figure width; narrow, so that text stays readable on a phone."""

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
    """matplotlib's defaults and ours; the user's matplotlibrc does not count."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # SVG text uses the reader's fonts, which may have what DejaVu lacks.
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        yield


def drawing(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run `draw` in this module's style."""

    @functools.wraps(draw)
    def styled(*arguments: P.args, **options: P.kwargs) -> T:
        with _style():
            return draw(*arguments, **options)

    return styled


def new_figure(height_in: float) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, `WIDTH_IN` wide, with room for outside legends."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()


def label(text: str, max_chars: int = 40) -> str:
    """`text` on one line of at most `max_chars` characters, all of them valid in XML."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    # matplotlib omits legend entries that begin with an underscore.
    clean = re.sub(r"^_", "\u200b_", " ".join(clean.split()))
    if len(clean) <= max_chars:
        return clean
    # Names of one family often differ only in their ends.
    tail = max_chars // 3
    return f"{clean[: max_chars - tail - 1].rstrip()}…{clean[-tail:].lstrip()}"


def _overlap(one: Any, other: Any) -> float:
    """Common area of two boxes in pixels²."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(wide, 0.0) * max(high, 0.0))


def _length_inside(box: Bbox, start: Any, end: Any) -> float:
    """Length in pixels of the part of a line that lies in `box` (Liang and Barsky 1984)."""
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
    """Write each text next to one of its points (x, y), where it overlaps the least.

    `lines`, from (x, y) to (x, y), and all points should stay visible. Greedy, in order.
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
        candidates = []
        for rank, (point, (dx, dy)) in enumerate(product(points, _OFFSETS_PT)):
            x, y = axes.transData.transform(point)
            left = x + dx * pixels - wide * (0.5 - 0.5 * _sign(dx))
            below = y + dy * pixels - high * (0.5 - 0.5 * _sign(dy))
            box = Bbox.from_bounds(left, below, wide, high)
            hidden = sum(_overlap(box, other) for other in taken)
            hidden += 6 * sum(_length_inside(box, *stroke) for stroke in strokes)
            outside = wide * high - _overlap(box, frame)
            candidates.append((hidden + 3 * outside + 4 * rank, rank, point, (dx, dy), box))
        _, _, point, (dx, dy), box = min(candidates, key=lambda candidate: candidate[:2])
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


def _bytes(figure: Figure, form: str, background: str = "#ffffff") -> bytes:
    data = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    with _style():
        figure.savefig(data, format=form, metadata=metadata, facecolor=background)
    return data.getvalue()


def svg(figure: Figure, title: str) -> str:
    """`figure` as an inline <svg> element: no prologue, and only ids that it refers to.

    `title` is for screen readers. Colors are CSS variables with the plain color as fallback.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    data = _bytes(figure, "svg", "none")
    prefix = "p" + hashlib.sha256(data).hexdigest()[:8] + "-"
    root = ElementTree.fromstring(data)
    # Its one style rule would apply to the whole page; the element itself gets it below.
    for node in (*root.findall(f"{{{_SVG}}}metadata"), *root.iter(f"{{{_SVG}}}defs")):
        for part in node.findall(f"{{{_SVG}}}style"):
            node.remove(part)
        if node.tag.endswith("metadata") or not len(node):
            next(parent for parent in root.iter() if node in parent).remove(node)
    used = set(re.findall(r"""(?:url\(|xlink:href=")#([^")]+)""", data.decode()))
    for node in root.iter():
        own = node.attrib.pop("id", None)
        if own is not None and own in used:
            node.set("id", prefix + own)
        for name, value in node.attrib.items():
            value = re.sub(
                r"^#(?=[^ ]+$)" if name == f"{{{_XLINK}}}href" else r"(?<=url\()#",
                f"#{prefix}",
                value,
            )
            if name == "style":
                value = re.sub(r"'DejaVu Sans'[^;]*", "system-ui, sans-serif", value)
                for color, variable in _VARIABLES.items():
                    value = value.replace(f": {color}", f": var(--{variable}, {color})")
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
    """Write `figure` on white as PNG (200 dpi) or SVG by the suffix of `path`, atomically.

    Errors: ConfigError for another suffix.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise ConfigError(
            f"{path}: a plot is written as .png or .svg; choose one of these suffixes"
        )
    replace_file(Path(path), _bytes(figure, form))
