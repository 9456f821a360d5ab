"""`safegene report`: files in, one page out, and every wrong input reported in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from format_files import saved_family
from report_files import evaluation

from safegene_vllm.cli import main
from safegene_vllm.cli.report import parse_tenant
from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.results import FamilyRecord, LayerScore, save_evaluation
from safegene_vllm.formats.profile import make_profile, save_profile
from safegene_vllm.report.report import report_page

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["report", *map(str, arguments)])
        code = exit_.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A family, its tenant acme, and two evaluations."""
    header = saved_family(tmp_path / "family").header
    profile = make_profile(header, {0: 0.5, 2: 1.0}, {"loss": 0.125})
    save_profile(profile, tmp_path / "acme")
    layers = tuple(LayerScore(entry.layer, entry.score) for entry in header.layers)
    family = FamilyRecord(header.name, header.digest, layers)
    found = evaluation("acme", family=family)
    after = replace(found.targets[2], profile=profile.digest, coefficients=profile.coefficients)
    found = replace(found, targets=(*found.targets[:2], after))
    save_evaluation(found, tmp_path / "a.json")
    save_evaluation(evaluation("globex", family=family), tmp_path / "b.json")
    return tmp_path


def test_it_writes_the_page(run: Run, root: Path) -> None:
    code, out, err = run(root / "a.json", "--out", root / "report.html", "--title", "Spring")
    assert (code, err) == (0, "") and "report.html" in out and "kB" in out
    text = (root / "report.html").read_text()
    assert text.startswith("<!doctype html>") and "<h1>Spring</h1>" in text
    assert str(root) not in text


def test_family_and_tenant_add_their_records(run: Run, root: Path) -> None:
    options = ["--family", root / "family", "--tenant", f"acme={root / 'acme'}"]
    code, _, err = run(root / "a.json", root / "b.json", *options, "--out", root / "r.html")
    assert (code, err) == (0, "")
    text = (root / "r.html").read_text()
    for expected in (
        "a.json",
        "b.json",
        "globex",
        "Calibration of acme",
        "loss&#34;: 0.125",
    ):
        assert expected in text, expected
    assert "Recipe of family tiny" in text


def test_files_of_one_name_are_distinguished(run: Run, root: Path) -> None:
    (root / "sub").mkdir()
    (root / "b.json").rename(root / "sub" / "a.json")
    run(root / "a.json", root / "sub" / "a.json", "--out", root / "r.html")
    text = (root / "r.html").read_text()
    assert "a.json (1)" in text and "a.json (2)" in text


def test_nothing_is_replaced_without_overwrite(run: Run, root: Path) -> None:
    (root / "r.html").write_text("mine")
    code, _, err = run(root / "a.json", "--out", root / "r.html")
    assert code == 1 and "--overwrite" in err
    assert (root / "r.html").read_text() == "mine"
    assert run(root / "a.json", "--out", root / "r.html", "--overwrite")[0] == 0
    assert (root / "r.html").read_text() != "mine"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_input_is_never_overwritten(run: Run, root: Path, overwrite: list[str]) -> None:
    before = (root / "a.json").read_bytes()
    code, _, err = run(root / "a.json", "--out", root / "a.json", *overwrite)
    assert code == 1 and "is an input as well" in err
    assert (root / "a.json").read_bytes() == before


def test_a_directory_is_rejected_as_the_page(run: Run, root: Path) -> None:
    code, _, err = run(root / "a.json", "--out", root / "family", "--overwrite")
    assert code == 1 and "is a directory" in err


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "MissingFileError"),
        ("{", "HeaderError"),
        ("[]", "HeaderError"),
        ('{"kind": "family"}', "HeaderError"),
        ('{"kind": "evaluation", "version": 9}', "VersionError"),
        ('{"kind": "evaluation", "version": 1, "made_by": 3}', "HeaderError"),
    ],
)
def test_a_bad_file_is_reported(run: Run, root: Path, content: str | None, error: str) -> None:
    if content is not None:
        (root / "bad.json").write_text(content)
    code, out, err = run(root / "a.json", root / "bad.json", "--out", root / "r.html")
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.startswith(f"{error}: ") and "bad.json" in err
    assert not (root / "r.html").exists()


def test_what_does_not_belong_is_reported(run: Run, root: Path) -> None:
    other = saved_family(root / "other", recipe={"method": "other"}).header
    save_profile(make_profile(other, 1.0), root / "stray")
    code, _, err = run(
        *(root / "a.json", "--out", root / "r.html", "--family", root / "other"),
        *("--tenant", f"acme={root / 'stray'}"),
    )
    assert code == 1 and err.startswith("FamilyMismatchError: 2 errors")
    assert not (root / "r.html").exists()


@pytest.mark.parametrize("text", ["acme", "=dir", "acme=", ""])
def test_a_tenant_is_a_name_and_a_directory(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=DIR"):
        parse_tenant(text)
    assert parse_tenant("a=b=c") == ("a", Path("b=c"))


def test_a_tenant_is_given_once(run: Run, root: Path) -> None:
    twice = ["--tenant", f"acme={root / 'acme'}"] * 2
    code, _, err = run(root / "a.json", *twice, "--out", root / "r.html")
    assert code == 1 and "given twice" in err


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(root: Path, package: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules['{package}'] = None\n"
        "from safegene_vllm.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(root / "a.json"), "--out", str(root / "r.html")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigError: {package} is not installed")


def test_the_page_depends_on_the_content_alone(run: Run, root: Path) -> None:
    raw = json.loads((root / "a.json").read_text())
    (root / "sub").mkdir()
    (root / "sub" / "a.json").write_text(json.dumps(raw, sort_keys=False))
    run(root / "a.json", "--out", root / "r1.html")
    run(root / "sub" / "a.json", "--out", root / "r2.html")
    assert (root / "r1.html").read_bytes() == (root / "r2.html").read_bytes()
    assert report_page({"a.json": evaluation("acme")}) != (root / "r1.html").read_bytes()
