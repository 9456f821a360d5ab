"""String judges by their published rules, coherence, and judges by spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from safegene_vllm.errors import ConfigError, MissingFileError
from safegene_vllm.evaluation.judges import (
    DEFAULT_JUDGES,
    FORMS,
    Judge,
    is_coherent,
    is_refusal,
    judge_record,
    make_judge,
    make_judges,
)
from safegene_vllm.evaluation.refusal_strings import ADVBENCH, OPENING, XSTEST


def says_refused(judge: Judge, *responses: str) -> list[bool]:
    assert judge.says == "refused"
    return judge.judge(["?"] * len(responses), responses)


def test_the_lists_are_as_long_as_published() -> None:
    assert (len(set(ADVBENCH)), len(set(XSTEST))) == (29, 21)
    assert all(string == string.lower() for string in (*XSTEST, *OPENING))


def test_advbench_looks_anywhere_and_minds_the_case() -> None:
    responses = ["Well, that is illegal here.", "Sure, ILLEGAL it is", "i'm sorry", "Hello! Sure"]
    assert says_refused(make_judge("strings:advbench"), *responses) == [True, False, False, True]


def test_xstest_looks_at_the_start_in_any_case() -> None:
    responses = ["\n SORRY, but no", "Well, sorry", "No. Not that", "Nothing is easier", ""]
    judge = make_judge("strings:xstest")
    assert says_refused(judge, *responses) == [True, False, True, False, False]


def test_opening_looks_at_the_first_160_characters() -> None:
    judge = make_judge("strings:opening")
    late = "x" * 160 + " I cannot"
    responses = ["Thanks. I can\u2019t help", late, late[1:], late[9:], "As an AI, sure"]
    assert says_refused(judge, *responses) == [True, False, False, True, True]
    assert judge.judge(["?"] * 5, responses) == [is_refusal(response) for response in responses]


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("nein\n\nje refuse\n")
    judge = make_judge(f"strings:{path}")
    assert judge.name == "strings:mine.txt" and "2 lines" in judge.rule
    assert says_refused(judge, "Ach nein, danke", "je REFUSE", "") == [True, False, False]


@pytest.mark.parametrize(
    ("text", "coherent"),
    [
        ("Here are three ways to bake bread.", True),
        ("yes", True),
        ("", False),
        ("?!... --", False),
        ("fine <|im_end|>", True),
        ("no no no no no no", False),
        ("no no no no no", True),
        ("a b c d " * 4, False),
        ("a b c d " * 3, True),
    ],
)
def test_coherence(text: str, coherent: bool) -> None:
    assert is_coherent(text) is coherent
    assert make_judge("coherence").judge(["?"], [text]) == [coherent]


def test_coherence_does_not_claim_what_decoding_hides() -> None:
    """Responses are decoded without special tokens: no judge could see a leaked template."""
    assert "template" not in make_judge("coherence").rule and "template" not in FORMS


def test_the_defaults_can_be_made_and_have_rules() -> None:
    judges = make_judges(DEFAULT_JUDGES)
    assert [judge.name for judge in judges] == list(DEFAULT_JUDGES)
    for judge in judges:
        judge.check()
    assert [judge_record(judge).says for judge in judges] == ["refused", "refused", "coherent"]
    assert all(judge_record(judge).rule.startswith(judge.says) for judge in judges)


@pytest.mark.parametrize("spec", ["", "strings", "strings:", "gpt4", "guard:", "coherence:x"])
def test_an_unknown_spec_lists_the_forms(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_judge(spec)
    assert FORMS in str(caught.value) and repr(spec) in str(caught.value)


def test_errors_of_all_judges_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(MissingFileError) as caught:
        make_judges([f"strings:{tmp_path}/none.txt", "gpt4", f"strings:{tmp_path}/empty.txt"])
    message = str(caught.value)
    assert "none.txt" in message and "'gpt4'" in message and "no strings" in message
    with pytest.raises(ConfigError, match="coherence is named twice"):
        make_judges(["coherence", "coherence"])
