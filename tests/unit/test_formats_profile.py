"""A profile on disk: every rule has a bad file, and only the right family accepts it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from format_files import edit_json, saved_family, tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st

from safegene_vllm.errors import (
    BoundsError,
    DigestError,
    FamilyMismatchError,
    FormatError,
    HeaderError,
    MissingFileError,
    NonFiniteError,
    SafegeneError,
    VersionError,
)
from safegene_vllm.formats.profile import (
    Profile,
    check_profile,
    has_profile,
    load_profile,
    make_profile,
    parse_profile,
    profile_json,
    save_profile,
)

ROOT = Path(__file__).parents[2]
HEADER = tiny_family().header
"""Three layers, vectors in 0 and 2, bounds 0 to 3."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_profile(make_profile(HEADER, [1.5, 0.0, 0.5], {"steps": 3}), tmp_path)
    return tmp_path


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "safegene.json", change)


def text(old: str, new: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "safegene.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


BAD: dict[str, tuple[Callable[[Path], Any], type[SafegeneError], str]] = {
    "missing": (lambda d: (d / "safegene.json").unlink(), MissingFileError, "safegene"),
    "empty": (lambda d: (d / "safegene.json").write_bytes(b""), HeaderError, "JSON"),
    "not UTF-8": (lambda d: (d / "safegene.json").write_bytes(b"\xff"), HeaderError, "utf-8"),
    "a list": (lambda d: (d / "safegene.json").write_bytes(b"[]"), HeaderError, "found list"),
    "duplicate key": (text('"kind"', '"kind": "x", "kind"'), HeaderError, "'kind' occurs twice"),
    "NaN coefficient": (text("1.5", "NaN"), NonFiniteError, "NaN"),
    "infinite coefficient": (text("1.5", "1e999"), NonFiniteError, "1e999"),
    "wrong kind": (edit(lambda d: d.update(kind="family")), HeaderError, "'family', expected"),
    "version 0": (edit(lambda d: d.update(format_version=0)), VersionError, "is 0.*reads 1"),
    "version text": (edit(lambda d: d.update(format_version="1")), VersionError, "is '1'"),
    "unknown key": (edit(lambda d: d.update(color="red")), HeaderError, "'color'"),
    "missing key": (edit(lambda d: d.pop("family")), HeaderError, "'family' is missing"),
    "coefficients number": (edit(lambda d: d.update(coefficients=1)), HeaderError, "a list"),
    "coefficient text": (edit(lambda d: d["coefficients"].append("1")), HeaderError, "3 is '1'"),
    "coefficient true": (edit(lambda d: d["coefficients"].append(True)), HeaderError, "True"),
    "family no digest": (edit(lambda d: d.update(family="x")), HeaderError, "family 'x'"),
    "digest flipped": (text('"digest": "sha256:', '"digest": "sha256:0'), HeaderError, "64 hex"),
    "other digest": (
        edit(lambda d: d.update(digest="sha256:" + "0" * 64)),
        DigestError,
        "calibrate again",
    ),
    "coefficient altered": (text("1.5", "1.25"), DigestError, "calibrate again"),
    "calibration altered": (text("3", "4"), DigestError, "calibrate again"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_profile_has_a_named_error(saved: Path, case: str) -> None:
    damage, error, says = BAD[case]
    damage(saved)
    for path in (saved, saved / "safegene.json"):
        if path.exists():
            with pytest.raises(error, match=says) as caught:
                load_profile(path)
            assert type(caught.value) is error


def test_a_truncated_profile_is_rejected(saved: Path) -> None:
    path = saved / "safegene.json"
    data = path.read_bytes().rstrip()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(HeaderError):
            load_profile(saved)


@pytest.mark.parametrize(
    ("coefficients", "says"),
    [
        ([1.0, 0.0], "2 coefficients, expected 3"),
        ([1.0, 0.0, 1.0, 0.0], "4 coefficients, expected 3"),
        ([], "0 coefficients"),
        ([-0.5, 0.0, 1.0], r"layer 0 has coefficient -0\.5, expected 0\.0 to 3\.0"),
        ([1.0, 0.0, 3.5], r"layer 2 has coefficient 3\.5"),
        ([1.0, 0.5, 1.0], r"layer 1 has coefficient 0\.5 but no vector"),
        ([math.nan, 0.0, 0.0], "layer 0 has coefficient nan"),
        ([0.0, math.inf, 0.0], "layer 1 has coefficient inf"),
        ([9.0, 9.0], r"(?s)3 errors.*2 coefficients.*layer 0.*layer 1"),
        ({3: 1.0}, r"layers \[3\] are outside"),
        ({1: 1.0}, "layer 1 has coefficient"),
        (4.0, r"(?s)2 errors.*layer 0.*layer 2"),
    ],
)
def test_coefficients_that_do_not_fit_are_rejected(coefficients: Any, says: str) -> None:
    with pytest.raises(BoundsError, match=says):
        make_profile(HEADER, coefficients)
    if isinstance(coefficients, list):
        with pytest.raises(BoundsError, match=says):
            check_profile(Profile(HEADER.digest, tuple(coefficients)), HEADER)


def test_a_family_may_allow_negative_coefficients() -> None:
    header = replace(HEADER, bounds=(-1.0, 1.0))
    assert make_profile(header, {2: -1.0}).coefficients == (0.0, 0.0, -1.0)


def test_a_profile_of_another_family_is_rejected_and_both_are_named() -> None:
    other = "sha256:" + "12" * 32
    with pytest.raises(FamilyMismatchError, match=f"{other}.*{HEADER.digest}"):
        check_profile(Profile(other, (0.0, 0.0, 0.0)), HEADER)


def test_three_ways_to_give_the_coefficients() -> None:
    profiles = [make_profile(HEADER, c) for c in ([2.0, 0.0, 2.0], {0: 2.0, 2: 2}, 2.0)]
    assert {p.coefficients for p in profiles} == {(2.0, 0.0, 2.0)}
    assert len({p.digest for p in profiles}) == 1
    assert make_profile(HEADER, -0.0).digest == make_profile(HEADER, 0).digest


coefficients = st.floats(0, 3, allow_subnormal=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(coefficients, coefficients, st.dictionaries(st.text(), json_values, max_size=3))
def test_saving_and_loading_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, first: float, last: float, calibration: Any
) -> None:
    directory = tmp_path_factory.mktemp("profile")
    profile = make_profile(HEADER, [first, 0.0, last], calibration)
    save_profile(profile, directory)
    loaded = load_profile(directory)
    assert loaded == profile
    assert loaded.digest == profile.digest
    check_profile(loaded, HEADER)


def test_own_fields_and_whole_numbers_do_not_touch_the_digest(saved: Path) -> None:
    before = load_profile(saved)
    edit(lambda d: d.update(x_note="ours"))(saved)
    text("0.0", "0")(saved)
    assert load_profile(saved) == before


@pytest.mark.parametrize(
    ("calibration", "error"),
    [({"loss": math.nan}, NonFiniteError), ({"seen": {1}}, HeaderError)],
)
def test_a_calibration_record_is_plain_json(calibration: Any, error: type) -> None:
    with pytest.raises(error, match="calibration"):
        make_profile(HEADER, 1.0, calibration)


def test_saving_leaves_the_tenant_s_files_alone(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("{}")
    save_profile(make_profile(HEADER, 1.0), saved)
    assert {p.name for p in saved.iterdir()} == {"adapter_config.json", "safegene.json"}
    assert load_profile(saved).coefficients == (1.0, 0.0, 1.0)


def test_a_family_s_description_is_not_overwritten(tmp_path: Path) -> None:
    saved_family(tmp_path / "family")
    with pytest.raises(FormatError, match="is a family"):
        save_profile(make_profile(HEADER, 1.0), tmp_path / "family")


def test_a_failed_save_leaves_the_old_profile(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, "replace", fail)
        save_profile(make_profile(HEADER, 1.0), saved)
    assert [p.name for p in saved.iterdir()] == ["safegene.json"]
    assert load_profile(saved).coefficients == (1.5, 0.0, 0.5)


def test_a_broken_profile_is_never_no_profile(tmp_path: Path) -> None:
    assert not has_profile(tmp_path)
    assert not has_profile(tmp_path / "none")
    (tmp_path / "safegene.json").symlink_to(tmp_path / "nowhere")
    assert has_profile(tmp_path)
    with pytest.raises(MissingFileError):
        load_profile(tmp_path)


def test_profiles_need_no_torch_and_their_digest_holds_in_another_process(saved: Path) -> None:
    code = (
        "import sys\n"
        "from safegene_vllm.formats.profile import load_profile\n"
        f"print(load_profile({str(saved)!r}).digest, 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4321"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    assert found == [load_profile(saved).digest, "False"]


def test_a_description_that_is_not_on_disk_is_read_by_the_same_rules(saved: Path) -> None:
    profile = load_profile(saved)
    raw = profile_json(profile)
    assert raw == json.loads((saved / "safegene.json").read_text())
    assert parse_profile(raw, "row 7") == profile
    with pytest.raises(DigestError, match="row 7"):
        parse_profile({**raw, "coefficients": [1.0, 0.0, 0.5]}, "row 7")
    with pytest.raises(HeaderError, match="row 7"):
        parse_profile({**raw, "coefficients": [True, 0.0, 0.5]}, "row 7")
    with pytest.raises(VersionError, match="row 7"):
        parse_profile({**raw, "format_version": 2}, "row 7")


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["large", "small"])
def test_an_integer_beyond_any_float_is_rejected(value: int) -> None:
    raw = {**profile_json(Profile("sha256:" + "0" * 64, (1.0, 0.0))), "coefficients": [value, 0.0]}
    with pytest.raises(HeaderError, match="coefficient 0 is larger than any float"):
        parse_profile(raw, "here")
