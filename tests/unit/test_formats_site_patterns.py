"""Keys of rank_pattern and alpha_pattern: PEFT's own matches, in a bounded number of steps."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safegene_vllm.errors import HeaderError
from safegene_vllm.formats import site_patterns
from safegene_vllm.formats.site_patterns import MAX_CHARS, SitePatterns

SITES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 2, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
] + ["lm_head", "q_proj", "transformer.h.3.attn.c_attn", "model-x.layers.1.mlp.up_proj"]


def peft(keys: list[str], site: str) -> int | None:
    """The results of PEFT's `get_pattern_key` and vLLM's `_match_pattern`."""
    return next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", site)), None)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "q_proj",
            "proj",
            "_proj",
            "^q_proj",
            "^lm_head$",
            "lm_head$",
            "",
            "^",
            "x.*|",
            ".*",
            ".",
        ),
        *("layers.1", "layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", "self_attn.q_proj"),
        *(r"^model\.layers\.0\..*", r"1\.mlp\.(up|v)_proj", r".*_proj", r"model\-x\..*"),
        *(r"layers\.\d+\.self_attn\.q_proj", r"layers\.(1|2|10)\..*", "(q_proj|v_proj)"),
        *("q_proj|v_proj", "^q_proj|up_proj", "q_proj|^lm_head", "(?:up|down)_proj", "a$|up_proj$"),
        *(r"layers\.[01]\..*", r"layers\.1[0-9]\..*", r"layers\.[^1]\..*", r"[\w.-]+", r"[^.]*"),
        *(r"layers\.(?:[0-9]|1[0-1])\..*?_proj", r"model.*?\.\w+_proj", "u?p_proj", "up?_pr.j"),
        *(r".*\.layers\.\d+\..*", r"[\d_a-z]+", r"(m|mlp\.u)p_proj", r"h\.\d\.[^\d.]+\..*"),
    ],
)
def test_what_configs_write_means_what_it_means_in_peft(key: str) -> None:
    patterns = SitePatterns("rank_pattern", [key])
    for site in SITES:
        assert patterns.first(site) == peft([key], site), site


def test_the_first_key_that_matches_decides() -> None:
    keys = ["v_proj", r"layers\.1\..*", "up_proj", "^lm_head", r".*\.q_proj", "q_proj"]
    patterns = SitePatterns("rank_pattern", keys)
    found = {site: patterns.first(site) for site in SITES}
    assert found == {site: peft(keys, site) for site in SITES}
    assert set(found.values()) == {0, 1, 2, 3, 4, 5, None}


CHARS = "ab1._-"
atoms = st.sampled_from(
    [*"ab1_", ".", r"\.", r"\-", r"\_", r"\d", r"\w", "[ab]", "[^a.]", "[a-b1]", r"[\d_.-]", "é"]
)
rows = st.lists(atoms, min_size=1, max_size=4).map("".join)
groups = st.builds(
    lambda mark, alternatives: f"{mark}{'|'.join(alternatives)})",
    st.sampled_from(["(", "(?:"]),
    st.lists(rows, min_size=1, max_size=3),
)
repeated = st.builds("{}{}".format, atoms, st.sampled_from(["*", "+", "?", "*?", "+?", "??"]))
branches = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "^"]),
    st.lists(rows | groups | repeated, max_size=3).map("".join),
    st.sampled_from(["", "", "$"]),
)
keys = (
    st.lists(branches, min_size=1, max_size=3)
    .map("|".join)
    .filter(lambda key: len(re.findall(r"(?<!\()[*+?]+", key)) <= 3)
)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(keys, min_size=1, max_size=4), st.lists(st.text(CHARS + "é٣", max_size=9), max_size=9)
)
@example([""], ["", ".", "a", "a."])
@example(["a|"], ["", "b.", "ba"])
def test_every_supported_key_matches_as_a_regular_expression(
    keys: list[str], sites: list[str]
) -> None:
    patterns = SitePatterns("rank_pattern", keys)
    for site in sites:
        assert patterns.first(site) == peft(keys, site)


@settings(max_examples=600, deadline=None)
@given(st.text(r"ab1.*+?|()[]^$\{}:-dwsb,=<P" + "\n", max_size=9), st.text("ab1.d-\\", max_size=6))
def test_what_is_taken_is_a_regular_expression_and_means_the_same(key: str, site: str) -> None:
    try:
        patterns = SitePatterns("rank_pattern", [key])
    except HeaderError:
        return
    assert patterns.first(site) == peft([key], site)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "(a",
            "a)",
            "((a))",
            "(a)*",
            "(a|b)+",
            "(|a)",
            "(a||b)",
            "()",
            "(?=a)",
            "(?P<x>a)",
            "(?i)a",
        ),
        *("*", "a**", "a*+", "a{2}", "a{2", "a}", "a^", "^^a", "(^a)", "(a$)", "a$b", "a$$", "$a"),
        *(
            "[",
            "[]",
            "[^]",
            "[]a]",
            "[a",
            "a]",
            "[b-a]",
            "[a-",
            "[a-Z]",
            r"[a-\d]",
            "[-a]",
            "[[a]]",
        ),
        *("[a&&b]", "[é]", r"[\s]", "\\", r"\1", r"\s", r"\b", r"\A", r"\Z", r"\x41", r"(a)\1"),
        *("a?b?c?d?", ".*.*.*.*", "a*|b*|c*|d*"),
    ],
)
def test_a_key_of_another_kind_is_rejected_with_what_to_write(key: str) -> None:
    with pytest.raises(HeaderError, match=r"^rank_pattern key ") as caught:
        SitePatterns("rank_pattern", ["q_proj", key])
    assert repr(key) in str(caught.value)
    assert r"write 'q_proj', '^model\.layers\.3\..*' or" in str(caught.value)


def test_all_bad_keys_are_named_and_none_at_length() -> None:
    with pytest.raises(HeaderError, match=r"(?s)500 errors.*'\(0.*'\(1.*and 497 more") as caught:
        SitePatterns("alpha_pattern", [f"({n}{'x' * 200}" for n in range(500)])
    assert len(str(caught.value)) < 10_000


def test_all_keys_together_have_a_longest() -> None:
    long = ["x" * 1000] * (MAX_CHARS // 1000)
    assert SitePatterns("rank_pattern", long).first("a." + "x" * 1000) == 0
    with pytest.raises(HeaderError, match="rank_pattern: its keys have over 200000 characters"):
        SitePatterns("rank_pattern", [*long, "x"])


HARD = [
    "a?" * 3 + "a" * 40 + "b",
    "(a|a)" * 40 + "b",
    "(a|aa)" * 40 + "b",
    "(a|.|[a]|\\w)" * 40 + "b",
    ".*.*.*b",
    "b.*.*.*",
    ".*a.*a.*a",
]


@pytest.mark.parametrize("key", HARD)
@pytest.mark.parametrize("char", ["a", "a.", "."])
def test_the_steps_of_a_key_are_no_more_than_linear_in_the_name(key: str, char: str) -> None:
    """The set of states is bounded by the key, however long the name."""

    def steps(length: int) -> int:
        patterns = SitePatterns("rank_pattern", [key])
        patterns.first((char * length)[:length])
        return patterns._steps

    one = steps(1000)
    assert steps(2000) <= 2 * one + 2000
    # Sets of states are found again, so that long names soon cost nothing.
    assert one <= 1000 * (site_patterns._NODE_STEPS + 10 * len(key))


def test_many_full_names_take_few_steps() -> None:
    """As PEFT writes the ranks of each site: as many keys as sites."""
    sites = [
        f"model.layers.{layer}.{module}_proj"
        for layer in range(80)
        for module in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    for keys in (sites, [f"^{re.escape(site)}" for site in sites]):
        patterns = SitePatterns("rank_pattern", keys)
        assert [patterns.first(site) for site in sites] == list(range(560))
        assert patterns._steps < site_patterns.MAX_STEPS / 10


def test_keys_that_take_too_many_steps_are_rejected() -> None:
    group = "(" + "|".join("a" * 300) + ")"
    patterns = SitePatterns("rank_pattern", [group * 2] * 150)
    with pytest.raises(HeaderError, match="rank_pattern: its keys take over 4000000 steps"):
        patterns.first("aa")
    assert len(patterns._nodes) == 1, "nothing is built beyond the limit"
