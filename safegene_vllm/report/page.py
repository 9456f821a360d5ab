"""One HTML page in one file: elements that escape what they hold, tables, style, contents.

Whatever is not `Html` already is text and is escaped, so nothing from a data set can become markup.
The page loads nothing, and says so to the browser. What stands on it is report's business.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_VOID = {"meta", "br"}

STYLE = """
:root { color-scheme: light; --ink: #1a1d21; --quiet: #5b626b; --grid: #d4d7db; --paper: #ffffff;
  --tint: #f3f5f7; --before: #d55e00; --after: #0072b2; --good: #00614a; --good-tint: #dff3ec;
  --bad: #8f3f00; --bad-tint: #fbe6d8; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e7e9ec; --quiet: #a3abb4; --grid: #3a4047; --paper: #15181b;
    --tint: #1f2327; --before: #f0813a; --after: #4ba6e0; --good: #7fdcbd; --good-tint: #12372c;
    --bad: #ffb483; --bad-tint: #43240f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 68rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; scroll-margin-top: .5rem;
  border-top: 2px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
a { color: var(--after); }
code, pre { font: .85em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--tint); padding: .7rem; border-radius: .4rem; }
small, .quiet { color: var(--quiet); }
small { font-size: .82em; }
nav ol { padding-left: 1.4rem; margin: .6rem 0; columns: 2 16rem; }
.note { background: var(--tint); border-left: .25rem solid var(--quiet); padding: .5rem .8rem;
  max-width: 46rem; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1.2rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--grid); }
th { font-size: .85rem; color: var(--quiet); font-weight: 600; }
td small { display: block; }
td.wide { overflow-wrap: anywhere; }
.compact { overflow-x: auto; }
.compact table { width: auto; font-size: .85rem; }
.compact th, .compact td { text-align: right; padding: .1rem 1rem .1rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr));
  gap: 1rem 2.4rem; align-items: start; }
figure { margin: .6rem 0; max-width: 36rem; break-inside: avoid; }
figcaption { font-size: .88rem; margin-top: .3rem; color: var(--quiet); }
svg.plot { display: block; width: 100%; height: auto; }
summary { cursor: pointer; padding: .3rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; margin: .5rem 0; }
.answer { background: var(--tint); border-radius: .4rem; padding: .6rem .8rem; min-width: 0;
  border-top: .2rem solid var(--grid); break-inside: avoid; }
.answer.before { border-top-color: var(--before); }
.answer.after { border-top-color: var(--after); }
.answer p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.chip { display: inline-block; font-size: .78rem; padding: 0 .5rem; margin: .1rem .3rem .1rem 0;
  border-radius: 1rem; border: 1px solid currentColor; color: var(--quiet); }
.chip.good { color: var(--good); background: var(--good-tint); }
.chip.bad { color: var(--bad); background: var(--bad-tint); }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
@media screen and (max-width: 40rem) {
  body { padding: .8rem .8rem 3rem; }
  nav ol { columns: 1; }
  .pair { grid-template-columns: 1fr; }
  .stack thead { display: none; }
  .stack tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--grid); }
  .stack td { display: flex; flex-wrap: wrap; column-gap: .6rem; align-items: baseline;
    padding: .1rem 0; border: 0; }
  .stack td::before { content: attr(data-label); color: var(--quiet); font-size: .85rem;
    width: 6.6rem; flex: none; }
  .stack td:first-child { display: block; font-weight: 600; }
  .stack td:first-child::before { content: none; }
  .stack td:first-child small { font-weight: 400; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .plots { grid-template-columns: 1fr 1fr; }
  .chip, .answer, .note { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


class Html(str):
    """Text that is HTML already. Only `el`, `join` and the plots make it."""

    __slots__ = ()


def _readable(text: str) -> str:
    """`text` without control characters: no HTML may hold them, and some turn text around."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t\u200c\u200d"
        else " "
        if letter.isspace()
        else "\ufffd"
        for letter in text
    )


def escaped(text: str) -> Html:
    """`text` as HTML: as it is if it is `Html`, else with everything in it made harmless."""
    return text if isinstance(text, Html) else Html(html.escape(_readable(text)))


def join(*parts: str) -> Html:
    """The parts one after the other, escaped where they are not `Html`."""
    return Html("".join(map(escaped, parts)))


def el(name: str, /, *children: str, **attributes: str) -> Html:
    """An element; `class_` and `data_label` are written `class` and `data-label`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_readable(value))}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], **attributes: str) -> Html:
    """A table whose rows become blocks on a phone; a cell may be text or `Html`."""
    head = el("tr", *(el("th", column, scope="col") for column in columns))
    body = [
        el(
            "tr",
            *(el("td", cell, data_label=name) for name, cell in zip(columns, row, strict=True)),
        )
        for row in rows
    ]
    attributes = {"class_": "stack"} | attributes
    return el("table", el("thead", head), el("tbody", *body), **attributes)


def figure(plot: str, caption: str) -> Html:
    """A plot (the SVG text that plots.py returns) with what it shows in words."""
    return el("figure", Html(plot), el("figcaption", caption))


@dataclass(frozen=True)
class Section:
    """A part of the page with its place in the contents."""

    anchor: str
    title: str
    body: Html


def page(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """The whole file, UTF-8; equal arguments give equal bytes."""
    contents = el(
        "nav",
        el("ol", *(el("li", el("a", s.title, href=f"#{s.anchor}")) for s in sections)),
        aria_label="Contents",
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(STYLE)),
    )
    parts = [
        el("section", el("h2", f"{number}. {part.title}"), part.body, id=part.anchor)
        for number, part in enumerate(sections, 1)
    ]
    body = el("body", el("header", el("h1", title), el("p", lead)), contents, el("main", *parts))
    return ("<!doctype html>\n" + el("html", head, "\n", body, lang="en") + "\n").encode()
