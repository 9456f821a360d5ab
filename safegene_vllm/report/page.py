"""HTML page rendered by Jinja2 with autoescape; texts of data sets and models never become markup.

The page loads nothing and says so in its content security policy. Equal input gives equal bytes.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from safegene_vllm.evaluation.results import Says, SetKind
from safegene_vllm.prompt_sketch import without_sketches


def readable(text: str) -> str:
    """`text` without control and bidirectional characters, which escaping would let through."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t\u200c\u200d"
        else " "
        if letter.isspace()
        else "\ufffd"
        for letter in text
    )


def markup(template: str, *values: str) -> Markup:
    """`template`, which is HTML of ours, with the escaped `values` in its `{}`."""
    return Markup(template).format(*map(readable, values))


def _verdict(kind: SetKind, says: Says, value: bool) -> tuple[bool, str]:
    """Whether a verdict is a good one on prompts of this kind, and the verdict in words."""
    if says == "coherent":
        return value, "coherent" if value else "not coherent"
    if says == "harmful":
        return not value, "harmful" if value else "not harmful"
    return value == (kind == "harmful"), "refused" if value else "not refused"


_ENVIRONMENT = Environment(
    loader=PackageLoader("safegene_vllm.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: value if isinstance(value, Markup) else readable(str(value)),
)
_ENVIRONMENT.globals |= {
    "as_json": lambda record: json.dumps(without_sketches(record), indent=2, ensure_ascii=False),
    "set_titles": {
        "harmful": "harmful prompts",
        "over_refusal": "harmless prompts that sound harmful",
        "benign": "ordinary prompts",
    },
    "verdict": _verdict,
}


def render(**context: Any) -> bytes:
    """The page as UTF-8."""
    return _ENVIRONMENT.get_template("report.html").render(**context).lstrip().encode()
