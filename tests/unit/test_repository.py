"""Repository rules: module docstrings, file sizes, names, and files that must agree."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from safegene_vllm import __version__

ROOT = Path(__file__).parents[2]
SHIPPED = ("safegene_vllm", "server")
CODE = (*SHIPPED, "examples", "benchmarks", "deploy", "tests")
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
NEVER_LOCKED = {"torchvision", "torchaudio", "torchcodec", "triton", "llama-cpp-python", "llm"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def short(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def pages() -> list[Path]:
    globs = ("*.md", "docs/**/*.md", "deploy/**/*.md", ".github/**/*.md")
    return sorted(path for pattern in globs for path in ROOT.glob(pattern))


def make_targets_in(text: str) -> set[str]:
    """Targets of every `make ...` in code spans and fences; prose is not read."""
    fences = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    targets: set[str] = set()
    for line in "\n".join(fences + spans).splitlines():
        # A line of a package tree is prose after its path.
        line = re.sub(r"^\w+[/.]\S*  .*|safegene family make", "", line)
        for call in re.findall(r"(?:^|[\s;&])make((?: [\w.=/-]+)+)", line.partition("#")[0]):
            targets |= {word for word in call.split() if "=" not in word and word[0] != "-"}
    return targets


def locked() -> dict[str, str]:
    """Package -> version, from requirements.txt."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def test_documents_name_only_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for document in pages():
        named = make_targets_in(document.read_text(encoding="utf-8"))
        assert named <= targets, f"{document.name}: no such make target: {sorted(named - targets)}"


def commands_of(workflow: dict[str, Any]) -> str:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return "\n".join(str(step.get("run", "")) for step in steps)


@pytest.mark.parametrize("name", ["ci", "gpu", "nightly", "release"])
def test_workflows_run_only_make_targets_and_files_that_exist(name: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    commands = commands_of(workflow)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
    paths = re.findall(r"\b(?:tests|benchmarks)/[\w/.-]+", commands)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    if name == "gpu":
        assert all("vars.GPU_RUNNER" in job["if"] for job in workflow["jobs"].values())


def test_releases_are_checked_and_published_without_a_token() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    workflow = yaml.safe_load(text)
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert {"make check", "make dist"} <= set(commands_of(workflow).splitlines())
    assert publish["needs"] == "build" and publish["environment"]["name"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in build
    assert "secrets." not in text and "password" not in text


def test_templates_and_hooks_are_yaml() -> None:
    for path in (*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]


VERSIONED = {
    "CITATION.cff": r"^version: (\S+)$",
    "deploy/helm/safegene/Chart.yaml": r"^(?:appVersion|version): (\S+)$",
    "deploy/docker/cpu.Dockerfile": r"^ARG VERSION=(\S+)$",
    "deploy/docker/gpu.Dockerfile": r"^ARG VERSION=(\S+)$",
    "deploy/README.md": r"safegene-vllm:(\d\S+)",
    "deploy/compose/README.md": r"safegene-vllm:(\d[\d.]*)",
    "deploy/compose/compose.gpu.yaml": r"safegene-vllm:(\d[\d.]*)",
    "deploy/kserve/llm-inference-service.yaml": r"safegene-vllm:(\d\S+)",
    "deploy/production-stack/engines.yaml": r'tag: "(\d[^"]+)"',
    "deploy/ray/README.md": r"safegene-vllm:(\d[\d.]*)",
    "deploy/ray/ray-service.yaml": r"safegene-vllm:(\d[\d.]*)",
    "CHANGELOG.md": r"\A(?:.*?\n)+?## \[(\d\S*)\] - \d{4}-\d\d-\d\d\n",
    "docs/reference/openapi.json": r'^  "version": "(\S+)"',
}
"""Files that repeat the version, which is safegene_vllm.__version__ (RELEASING.md)."""


@pytest.mark.parametrize("name", VERSIONED)
def test_the_version_is_the_same_everywhere(name: str) -> None:
    found = re.findall(VERSIONED[name], (ROOT / name).read_text(), re.MULTILINE)
    assert found and set(found) == {__version__}, name
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "safegene_vllm.__version__"
    }


def test_the_changelog_has_an_unreleased_section_and_dated_releases() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]" and len(headings) > 1
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", h) for h in headings[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_the_reader_of_make_targets() -> None:
    text = (
        "make sure `make a` works\n```sh\n$ make b C=1 d  # make e\ncd x && make f\n```\n`make-g`"
    )
    assert make_targets_in(text) == {"a", "b", "d", "f"}


def test_every_make_target_is_in_the_help() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    helped = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert targets == helped
    database = subprocess.run(
        ["make", "-pn", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", database, re.MULTILINE)
    assert sorted(phony.split()) == sorted(helped)


def test_every_module_has_a_docstring() -> None:
    missing = [
        path
        for path in sources(CODE)
        if (text := path.read_text(encoding="utf-8")).strip()
        and not ast.get_docstring(ast.parse(text))
    ]
    assert short(missing) == []


def test_no_module_is_too_large() -> None:
    large = [
        path
        for path in sources(SHIPPED)
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES
    ]
    assert short(large) == [], f"over {MAX_LINES} lines"


def test_no_module_has_a_vague_name() -> None:
    vague = [
        path
        for path in sources(CODE)
        if VAGUE_NAMES & {*path.relative_to(ROOT).parent.parts, path.stem}
    ]
    assert short(vague) == [], "name it for what it holds"


def entry_points() -> list[str]:
    project = PYPROJECT["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    return [target for group in groups for target in group.values()]


@pytest.mark.parametrize("target", entry_points())
def test_entry_points_name_something_that_exists(target: str) -> None:
    module, _, name = target.partition(":")
    bases = [root / Path(*module.split(".")) for root in (ROOT, ROOT / "server")]
    files = [f for base in bases for f in (base.with_suffix(".py"), base / "__init__.py")]
    found = [f for f in files if f.is_file()]
    if not found:
        pytest.skip(f"{module} is not built yet")
    assert len(found) == 1, f"{module} is two files: {short(found)}"
    defined: set[str] = set()
    for node in ast.parse(found[0].read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                defined.add(node.name)
            case ast.Import() | ast.ImportFrom():
                defined |= {alias.asname or alias.name for alias in node.names}
            case ast.Assign():
                defined |= {ast.unparse(t) for t in node.targets}
            case ast.AnnAssign():
                defined.add(ast.unparse(node.target))
    assert name in defined, f"{short(found)[0]} does not define {name}"


def test_the_lock_leaves_out_what_breaks_a_cpu_torch() -> None:
    assert NEVER_LOCKED.isdisjoint(locked())
    assert locked()["torch"].endswith("+cpu")


def test_the_lock_holds_every_declared_dependency() -> None:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + [d for x in extras if x != "gpu" for d in extras[x]]
    names = {re.split(r"[\[<>=!~ ;]", dependency)[0] for dependency in declared}
    assert names <= set(locked()), f"run make lock: {sorted(names - set(locked()))}"
