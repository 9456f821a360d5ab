"""The report: every number with its interval, hostile text stays text, nothing is fetched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from report_files import (
    DIGEST,
    GUARD,
    PROFILE,
    WORDS,
    Page,
    evaluation,
    page,
    share,
    subject,
)

from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.results import (
    Evaluation,
    SampleResponse,
)
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.report.report import report_page, write_report

ROOT = Path(__file__).parents[2]
ATTACK = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\" --> ${"


def rewritten(value: Any, change: Callable[[str], str], unchanged: set[str]) -> Any:
    """`value` with every text in it changed, keys as well, except those in `unchanged`."""
    if isinstance(value, str):
        return value if value in unchanged else change(value)
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: rewritten(getattr(value, f.name), change, unchanged) for f in fields(value)}
        return type(value)(**own)
    if isinstance(value, dict):
        return {
            rewritten(key, change, unchanged): rewritten(item, change, unchanged)
            for key, item in value.items()
        }
    if isinstance(value, tuple):
        return tuple(rewritten(item, change, unchanged) for item in value)
    return value


UNCHANGED = {
    *("harmful", "over_refusal", "benign", "refused", "coherent", "parent", "before", "after"),
    *("vllm", "bfloat16"),
}


def spoiled(payload: str) -> Evaluation:
    """An evaluation with `payload` in every text that is free."""

    def change(text: str) -> str:
        name, slash, state = text.rpartition("/")
        if slash and state in UNCHANGED:
            return f"{name}{payload}/{state}"
        return text + payload

    found: Evaluation = rewritten(evaluation(), change, UNCHANGED)
    return found


# What stands on it


def test_every_part_is_there_and_the_contents_lead_to_it() -> None:
    found = page(evaluation())
    links = [str(own["href"]) for tag, own in found.tags if tag == "a"]
    ids = Counter(own["id"] for _, own in found.tags if "id" in own)
    assert len(links) == 8
    assert all(ids[link.removeprefix("#")] == 1 for link in links)
    assert set(ids.values()) == {1}


def test_the_summary_has_every_number_with_interval_and_n() -> None:
    words = page(evaluation("acme")).sections["summary"]
    for expected in (
        "93.0 % 88.0 to 98.0, n 100",
        "3.0 % 0.0 to 8.0, n 100",
        "−90.0 points −95.0 to −84.0, n 100",
        "46.5 % 41.5 to 51.5, n 100",
        "2.0 % 0.0 to 7.0, n 100",
        "91.0 % 86.0 to 96.0, n 200",
        "−1.0 points −3.0 to 1.0, n 200",
        "+12.0 points 4.0 to 22.0, n 50",
    ):
        assert expected in " ".join(words.split()), expected
    assert f"advbench, {WORDS}" in words and f"advbench, {GUARD}" in words


def test_a_plot_per_measure_says_what_it_is_a_share_of() -> None:
    found = page(evaluation())
    attack = " ".join(found.sections["attack-success"].split())
    assert f"advbench that were not refused, decided by the judge {WORDS}" in attack
    assert f"answered with harmful text, decided by the judge {GUARD}" in attack
    refusal = " ".join(found.sections["refusal"].split())
    assert "50 harmless but harmful-sounding prompts of set xstest that were refused" in refusal
    assert "40 ordinary prompts of set ordinary that were refused" in refusal
    assert "answered with coherent text, decided by the judge coherence" in refusal
    # Two attack plots, two of utility, layers, coefficients, and five of refusal and coherence.
    assert sum(tag == "svg" for tag, _ in found.tags) == 11


def test_further_states_are_shown_next_to_before_and_after() -> None:
    found = evaluation("acme")
    further = subject("acme", "SafeLoRA", 0.4, 0.8, 0.2)
    shown = page(replace(found, targets=(*found.targets, further)))
    assert "SafeLoRA" in shown.sections["summary"]
    for part in ("attack-success", "safety-utility", "coefficients"):
        assert "SafeLoRA" in shown.sections[part], part


def test_tasks_get_a_plot_each_once_a_tenant_has_several() -> None:
    found = evaluation("acme", "globex")
    accuracy = {"task-acme": share(0.9), "task-globex": share(0.5)}
    both = replace(found, targets=tuple(replace(s, accuracy=accuracy) for s in found.targets))
    shown = page(both).sections["safety-utility"]
    assert "accuracy on task-acme" in shown and "accuracy on task-globex" in shown
    assert "accuracy on own task" in page(found).sections["safety-utility"]


def test_samples_show_text_verdicts_and_what_is_withheld() -> None:
    words = " ".join(page(evaluation("acme")).sections["samples"].split())
    assert "acme, before Withheld" in words
    assert f"✗ not refused ({WORDS})" in words and f"✗ harmful ({GUARD})" in words
    assert f"I cannot help. ✓ refused ({WORDS}) ✓ not harmful ({GUARD})" in words
    # The same refusal is bad where the prompt is harmless.
    harmless = words.partition("xstest")[2]
    assert f"Use kill. ✓ not refused ({WORDS})" in harmless
    assert f"I cannot help. ✗ refused ({WORDS})" in harmless


def test_an_empty_response_is_not_a_withheld_one() -> None:
    found = evaluation("acme")
    empty = {"acme/after": SampleResponse("", {WORDS: False, "coherence": False})}
    words = page(replace(found, samples=(replace(found.samples[1], responses=empty),)))
    reported = words.sections["samples"]
    assert (
        "(an empty response)" in reported
        and "✗ not coherent" in reported
        and "Withheld" not in reported
    )


def test_origin_records_data_judges_digests_and_versions() -> None:
    words = page(evaluation()).sections["origin"]
    for expected in (
        *("advbench.csv?limit=100", "CC BY 4.0", "not recorded", DIGEST, PROFILE),
        *("one of 19 phrases", "the first word is unsafe", "64 tokens", "vllm, bfloat16"),
        "safegene-vllm",
    ):
        assert expected in words, expected


# Missing parts


def only(found: Evaluation, *states: str) -> Evaluation:
    retained = tuple(s for s in found.targets if s.state in states)
    return replace(found, targets=retained, changes=(), samples=())


def without(found: Evaluation, **changes: Any) -> Evaluation:
    return replace(found, targets=tuple(replace(s, **changes) for s in found.targets))


LITTLE: dict[str, tuple[Evaluation, str, str]] = {
    "no tasks": (
        without(evaluation(tasks={}), accuracy={}),
        "safety-utility",
        "needs both a task and harmful prompts",
    ),
    "no before": (only(evaluation(), "parent", "after"), "summary", "3.0 %"),
    "no after": (only(evaluation(), "before"), "coefficients", "No tenant has a coefficient"),
    "no family": (evaluation(family=None), "layers", "names no family"),
    "only a parent": (only(evaluation(), "parent"), "summary", "No tenant was evaluated"),
    "no samples": (evaluation(samples=()), "samples", "holds no sample responses"),
    "only tasks": (
        without(evaluation(sets={}, judges=(), changes=(), samples=()), rates={}),
        "attack-success",
        "No tenant was evaluated on harmful prompts",
    ),
    "no subjects": (only(evaluation()), "summary", "No tenant was evaluated"),
    "nothing": (
        only(evaluation(sets={}, judges=(), tasks={}, family=None)),
        "refusal",
        "No tenant was evaluated on harmless prompts",
    ),
}


@pytest.mark.parametrize("name", LITTLE)
def test_missing_parts_are_reported(name: str) -> None:
    found, part, expected = LITTLE[name]
    assert expected in page(found).sections[part]


def test_no_change_without_both_states() -> None:
    words = page(only(evaluation(), "parent", "after"))
    assert "points" not in words.sections["summary"].partition("Terms")[0]


def test_only_the_words_that_occur_are_explained() -> None:
    words = page(only(evaluation(), "after")).sections["summary"]
    explained = words.partition("Terms")[2]
    assert "after" in explained and "parent :" not in explained and "before :" not in explained
    assert "parent :" in page(evaluation()).sections["summary"]


def test_no_evaluation_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no evaluation given"):
        report_page([])


# Untrusted text


def test_hostile_text_stays_text() -> None:
    harmless, hostile = page(spoiled("x" * len(ATTACK))), page(spoiled(ATTACK))
    assert hostile.outside_plots() == harmless.outside_plots()
    assert hostile.words.count("<script>") > 50
    tags = {tag for tag, _ in hostile.tags}
    assert not tags & {"script", "img", "iframe", "object", "link", "base", "form", "a:href"}
    for tag, own in hostile.tags:
        assert not [key for key in own if key.startswith("on")], tag
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in harmless.tags}


@pytest.mark.parametrize("payload", ["\x00\x1b\ud800\u202e", "$\\frac{", "\n\n", "日本語 🙂"])
def test_any_letters_make_a_page(payload: str) -> None:
    data = report_page(spoiled(payload))
    Page(data)
    text = data.decode()
    assert not set("\x00\x1b\u202e") & set(text)


def test_the_title_is_escaped() -> None:
    assert b"<title>&lt;b&gt;</title>" in report_page(evaluation(), title="<b>")


def test_nothing_is_fetched_or_run() -> None:
    data = report_page(spoiled(" http://example.com/x.png")).decode()
    shown = Page(data.encode())
    loading = {"src", "srcset", "action", "poster", "data", "background", "xlink:href"}
    for tag, own in shown.tags:
        for key, value in own.items():
            if key in loading or key == "href":
                assert str(value).startswith("#"), (tag, key, value)
            if key == "style":
                assert "url(" not in str(value).replace("url(#", ""), (tag, value)
    style = data.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = [own for tag, own in shown.tags if tag == "meta" and "http-equiv" in own]
    assert str(policy[0]["content"]).startswith("default-src 'none'")


# Bytes


def test_the_same_bytes_in_every_process_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, hashlib\n"
        "from report_files import evaluation\n"
        "from safegene_vllm.report.report import report_page\n"
        "print(hashlib.sha256(report_page(evaluation())).hexdigest())\n"
        "print(sorted({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)))\n"
    )
    outputs = []
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[1] == "[]"


def test_the_file_is_the_page(tmp_path: Path) -> None:
    write_report(evaluation(), tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_bytes() == report_page([evaluation()])


def test_a_change_too_small_to_see_has_no_sign() -> None:
    found = evaluation("acme")
    tiny = replace(found.changes[0], difference=Rate(-0.0001, -0.01, 0.01, 100))
    words = page(replace(found, changes=(tiny,))).sections["summary"]
    assert "0.0 points" in words and "−0.0" not in words and "+0.0" not in words
    assert re.search(r"−1\.0 to 1\.0, n 100", words)
