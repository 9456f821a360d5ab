"""Documentation under test: what exists is documented, and what is documented exists."""

from __future__ import annotations

import ast
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown.extensions.toc import slugify
from prometheus_client import Counter, Gauge, Histogram
from typer.main import get_command

from docs import generate, hooks
from safegene_server.access.route_permissions import OURS
from safegene_server.engine_routes import load_router, router
from safegene_server.metrics import definitions
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.applied import STATES
from safegene_server.monitoring.probes import ProbeSettings, gauges
from safegene_server.sagemaker import ADAPTERS, INVOCATIONS
from safegene_server.settings import ServerSettings
from safegene_vllm import errors
from safegene_vllm.cli import COMMANDS, build_app
from safegene_vllm.client import Client
from safegene_vllm.launcher.command import WORKER_EXTENSION
from safegene_vllm.launcher.config_file import ConfigFile
from safegene_vllm.plugin.compat import NEWEST, OLDEST
from safegene_vllm.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
README = (ROOT / "README.md").read_text()
METRICS = (REFERENCE / "metrics.md").read_text()
SERVING = (DOCS / "guides" / "serving.md").read_text()
MAX_README_LINES = 150
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(set(DOCS.rglob("*.md")) - {DOCS / "performance" / "notes.md"}),
    *sorted(ROOT.glob("deploy/**/*.md")),
]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# -- README --------------------------------------------------------------------------------------


def test_the_readme_is_short_and_honest_about_gpus() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES
    assert "has run on a GPU yet" in README
    assert "https://arxiv.org/abs/2606.06519" in README and "reproduce" not in README


def test_every_command_is_in_the_readme_and_has_help() -> None:
    command: Any = get_command(build_app())
    assert set(command.commands) == set(COMMANDS)
    for name in COMMANDS:
        assert f"`safegene {name}`" in README, name
        group = command.commands[name]
        for part in getattr(group, "commands", {"": group}).values():
            for parameter in part.params:
                assert parameter.name == "help" or getattr(parameter, "help", None), (name, part)


def test_every_command_in_the_readme_exists() -> None:
    assert set(re.findall(r"safegene (\w+)", README)) <= set(COMMANDS)
    assert {"make demo", "make test"} <= set(re.findall(r"^make \w+", README, re.MULTILINE))


def test_the_supported_versions_are_the_documented_ones() -> None:
    low, high = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    assert f"vLLM outside {low} to {high}" in SERVING
    for page in ("README.md", "docs/quickstart.md", "docs/guides/upgrade.md"):
        assert f"{low} to {high}" in (ROOT / page).read_text(), page
    assert f"{low} to {high}" in (ROOT / "deploy/docker/gpu.Dockerfile").read_text()


# -- reference pages -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_fresh(name: str) -> None:
    assert name not in generate.stale(), "run make docs-reference"


def test_a_stale_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "REFERENCE", tmp_path)
    assert generate.stale() == list(generate.PAGES)


SCHEMAS = (
    (ConfigFile, "serve."),
    (ServerSettings, ""),
    (Settings, ""),
)


@pytest.mark.parametrize(("model", "prefix"), SCHEMAS)
def test_every_setting_is_documented_with_its_meaning(model: Any, prefix: str) -> None:
    page = (REFERENCE / "settings.md").read_text()
    rows = list(generate.settings_rows(model.model_json_schema(), prefix))
    assert {row[0].removeprefix(prefix).partition(".")[0].rstrip("[]") for row in rows} == set(
        model.model_fields
    )
    for key, _, _, meaning in rows:
        assert meaning, f"{key} has no description"
        assert key == "serve" or f"| `{key}` |" in page, key


def test_no_meaning_is_written_for_a_setting_that_does_not_exist() -> None:
    known = {
        row[0]
        for model, prefix in SCHEMAS
        for row in generate.settings_rows(model.model_json_schema(), prefix)
    }
    assert set(generate.MEANINGS) <= known


def test_every_route_and_no_other_is_documented() -> None:
    real = {
        f"{method} {path}"
        for path, methods in generate.api_app().openapi()["paths"].items()
        for method in map(str.upper, methods)
    }
    page = (REFERENCE / "api.md").read_text()
    assert set(re.findall(r"^\| `([A-Z]+ /\S+)` \|", page, re.MULTILINE)) == real
    assert all(
        path.partition(" ")[2].startswith(OURS) for path in real - {"POST /v1/load_lora_adapter"}
    )
    table = SERVING.split("## Routes")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+ /[\w/]+)` \|", table, re.MULTILINE)) == {
        f"{method} {route.path}"
        for route in (*router.routes, *load_router.routes)
        for method in route.methods
    } | {f"POST {ADAPTERS}", f"POST {INVOCATIONS}"}


def test_every_option_of_every_command_is_documented() -> None:
    page = (REFERENCE / "cli.md").read_text()
    command: Any = get_command(build_app())
    for name, group in command.commands.items():
        for word, part in getattr(group, "commands", {"": group}).items():
            title = f"safegene {name} {word}".strip()
            section = re.split(r"\n#{2,4} ", page.split(f" `{title}`\n")[1])[0]
            for parameter in part.params:
                for option in parameter.opts:
                    if option.startswith("--") and option != "--help":
                        assert f"`{option}" in section, (title, option)


def test_every_error_is_documented() -> None:
    page = (REFERENCE / "errors.md").read_text()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.SafegeneError):
            assert f"`{name}`" in page, name
    for reason in definitions.REASONS:
        assert f"`{reason}`" in page, reason


def test_shell_completion_is_documented() -> None:
    assert "--install-completion" in (REFERENCE / "cli.md").read_text()


# -- metrics and probes --------------------------------------------------------------------------


def test_every_metric_and_no_other_is_documented_with_type_and_labels() -> None:
    section = METRICS.split("## Every metric")[1].split("\n## ")[0]
    row = re.compile(r"^\| `(safegene_\w+)` \| ([cgh]) \|([\w, ]*)\| (.+) \|$", re.MULTILINE)
    found = row.findall(section)
    assert len(found) == len(re.findall(r"^\| `", section, re.MULTILINE))
    described = {name: (kind, labels.strip()) for name, kind, labels, _ in found}
    kinds: dict[type, str] = {Counter: "c", Gauge: "g", Histogram: "h"}
    real = {}
    for metric in (*vars(definitions).values(), *definitions.replica_gauges()):
        if type(metric) in kinds:
            name = metric._name + ("_total" if type(metric) is Counter else "")
            real[name] = (kinds[type(metric)], ", ".join(metric._labelnames))
    assert described == real
    assert len(described) == len(found), "a metric is described twice"


def test_every_metric_of_probes_and_no_other_is_documented() -> None:
    section = METRICS.split("## Probes")[1].split("\n## ")[0]
    described = re.findall(r"^\| `(safegene_\w+)(?:\{([\w,]+)\})?` \|", section, re.MULTILINE)
    metrics = [m for m in vars(gauges).values() if isinstance(m, Gauge | Counter)]
    real = {
        metric.describe()[0].name + ("_total" if isinstance(metric, Counter) else ""): ",".join(
            metric._labelnames
        )
        for metric in metrics
    }
    assert dict(described) == real and len(metrics) == 8


def test_the_values_of_labels_are_documented() -> None:
    for value in (*definitions.OUTCOMES, *definitions.REASONS, *STATES, definitions.RULE):
        assert f"`{value}`" in METRICS, value


def fields_of(settings: Any) -> dict[str, Any]:
    """Name and default of each setting of a dataclass or a pydantic model."""
    if is_dataclass(settings):
        return {field.name: field.default for field in fields(settings)}
    return {name: field.default for name, field in settings.model_fields.items()}


def test_the_examples_of_settings_are_complete_and_show_the_defaults() -> None:
    page = (DOCS / "guides" / "probes.md").read_text()
    given = yaml.safe_load(page.split("```yaml")[1].split("```")[0])["probes"]
    defaults = fields_of(ProbeSettings)
    assert set(given) == set(defaults)
    chosen = {"enabled", "prompts", "tenants"}
    assert {k: v for k, v in given.items() if k not in chosen} == {
        k: v for k, v in defaults.items() if k not in chosen
    }
    assert ProbeSettings(**given).enabled
    monitoring = (DOCS / "guides" / "monitoring.md").read_text()
    example = yaml.safe_load("metrics:\n" + monitoring.split("metrics:\n")[1].split("```")[0])
    assert list(example["metrics"]) == list(fields_of(MetricsSettings))


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_example_of_a_settings_file_is_accepted() -> None:
    (text,) = fences(DOCS / "guides" / "tenants.md", "yaml")
    given = yaml.safe_load(text)
    settings = ServerSettings(**given)
    assert ConfigFile(**given["serve"]).flags() == ("--max-lora-rank", "16", "--port", "8000")
    assert [key.name for key in settings.keys] == ["admin", "acme-app"]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_python_examples_parse_and_use_methods_that_exist(page: Path) -> None:
    for text in fences(page, "python"):
        ast.parse(text)
        for method in re.findall(r"\bserver\.(\w+)\(", text):
            assert hasattr(Client, method), method


# -- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return place


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]*)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]*>', text)
        assert not [url for url in loaded if "//" in url.replace("\\/", "/")], page.name


def test_links_out_of_the_docs_become_text_or_links_to_the_repository() -> None:
    def rewritten(repo_url: str) -> str:
        page = type("Page", (), {"file": type("File", (), {"src_uri": "guides/deploy.md"})})
        config = type("Config", (), {"repo_url": repo_url})
        text = "[a](../../deploy/README.md#x), [b](serving.md), ![c](../images/a.svg), [d](#e)"
        return hooks.on_page_markdown(text, page=page, config=config, files=None)

    unchanged = ", [b](serving.md), ![c](../images/a.svg), [d](#e)"
    assert rewritten("") == "a (`deploy/README.md#x`)" + unchanged
    assert rewritten("https://x/y/") == "[a](https://x/y/blob/main/deploy/README.md#x)" + unchanged


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match(r"https?:|mailto:", target):
            yield target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {slugify(text.replace("`", ""), "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = page if not path else page.parent / path
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), target


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"(\S+\.md)$", text, re.MULTILINE)
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages - {"performance/notes.md"})


def test_pages_named_in_the_code_exist() -> None:
    found = {}
    for folder in ("safegene_vllm", "server", "benchmarks", "deploy", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yml", ".yaml", ".md", ".Dockerfile") and path.is_file():
                for name in re.findall(r"(?<![\w/.])docs/[\w/-]+\.md", path.read_text()):
                    found.setdefault(name, path)
    missing = {name: names([path]) for name, path in found.items() if not (ROOT / name).exists()}
    assert found and not missing


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_programs_named_in_pages_exist(page: Path) -> None:
    text = page.read_text()
    programs = re.findall(r"python -m ((?:deploy|benchmarks|examples|safegene_\w+)[\w.]*)", text)
    files = [name.rstrip(".").replace(".", "/") + ".py" for name in programs]
    files += re.findall(r"python ((?:\w+/)+\w+\.py)", text)
    packages = [name for name in files if (ROOT / name).with_suffix("").is_dir()]
    assert [name for name in files if name not in packages and not (ROOT / name).exists()] == []


def test_messages_of_the_troubleshooting_page_exist() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    messages = [re.sub(r"^\w+Error: | ?\.\.\.$", "", cell) for cell in cells]
    messages = [text for text in messages if re.match(r"(?:the|found|SafeGene) ", text)]
    sources = [*(ROOT / "safegene_vllm").rglob("*.py"), *(ROOT / "server").rglob("*.py")]
    code = "".join(re.sub(r'"\s+f?"', "", path.read_text()) for path in sources)
    assert len(messages) >= 4
    assert [text for text in messages if text not in code] == []


def test_the_worker_extension_is_named_as_it_is() -> None:
    named = set(re.findall(r"safegene_vllm\.plugin\.worker_extension\.\w+", SERVING))
    assert named == {WORKER_EXTENSION}
    module, _, name = WORKER_EXTENSION.rpartition(".")
    source = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert name in {node.name for node in source.body if isinstance(node, ast.ClassDef)}


# -- architecture --------------------------------------------------------------------------------

ARCHITECTURE = (DOCS / "architecture.md").read_text()
STEPS = re.findall(r"`([\w/]+\.py):([\w.]+)`", ARCHITECTURE)


@pytest.mark.parametrize(("file", "name"), sorted(set(STEPS)))
def test_steps_of_the_walks_exist(file: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        assert found, f"{file} does not define {name}"
        body = found[0].body


def test_both_walks_have_their_steps() -> None:
    coefficient = ARCHITECTURE.split("## A coefficient")[1].split("\n## ")[0]
    change = ARCHITECTURE.split("## A profile change")[1]
    for walk in (coefficient, change):
        assert len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) >= 8
        assert len(re.findall(r"`[\w/]+\.py:[\w.]+`", walk)) >= 10


def test_the_package_tree_is_short_and_real() -> None:
    tree = ARCHITECTURE.split("## Packages")[1].split("```")[1].strip("\n").splitlines()
    assert len(tree) <= 25
    parents: list[str] = []
    for line in tree:
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"[\w/]+(?:/|\.py)", line[:24]):
            path = posixpath.join(*parents[:depth], name)
            assert (ROOT / path).exists(), path
            if name.endswith("/"):
                parents[depth:] = [name]
