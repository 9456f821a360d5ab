"""Checks of Kubernetes objects, and of every safegene.yaml that deploy/ writes.

Objects are the chart's and those written for other operators. What Kubernetes defines is validated
strictly against its schemas, for every release in chart.KUBERNETES; other kinds must be listed in
CUSTOM. There is no API server, so admission, defaults and controllers are not checked.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from deploy.check import chart
from safegene_server.settings import ENV, read_settings
from safegene_vllm.errors import ConfigError

Object = Mapping[str, Any]
FILE = "safegene.yaml"
VALUES = {"engines.yaml", "router.yaml"}
"""Values for the production-stack's chart, which is not rendered here."""


def written(root: Path) -> list[Path]:
    """Files of whole objects for other operators."""
    folders = ("kserve", "production-stack", "ray")
    found = [p for folder in folders for p in (root / "deploy" / folder).glob("*.yaml")]
    return sorted(path for path in found if path.name not in VALUES)


def _texts(root: Path, kubernetes: str) -> Iterator[tuple[str, str, str]]:
    """(name, YAML text, error) of the chart with every file of ci/, and of all written objects."""
    folder = chart.chart_of(root)
    for values in sorted(folder.glob("ci/*.yaml")):
        try:
            yield f"ci/{values.name}", chart.render(folder, values, kubernetes), ""
        except subprocess.CalledProcessError as error:
            yield f"ci/{values.name}", "", error.stderr.strip()
    for path in written(root):
        yield str(path.relative_to(root / "deploy")), path.read_text(), ""


def rendered_and_written(root: Path) -> list[str]:
    """Validate every object for every release of Kubernetes."""
    errors = []
    for kubernetes in chart.KUBERNETES:
        for name, text, failure in _texts(root, kubernetes):
            found = [failure] if failure else of_text(text, kubernetes)
            errors += [f"{name}: {error}" for error in found]
    return list(dict.fromkeys(errors))


def settings_files(root: Path) -> list[str]:
    """Read every safegene.yaml with the server's own settings; secrets are not read."""
    compose = root / "deploy" / "compose" / FILE
    files = {str(compose.relative_to(root)): compose.read_text()}
    errors = []
    for name, text, failure in _texts(root, chart.KUBERNETES[-1]):
        if failure:
            errors.append(f"{name}: not rendered: {failure}")
        for found in yaml.safe_load_all(text):
            if found and found.get("kind") == "ConfigMap" and FILE in found["data"]:
                files[f"{name}, {FILE}"] = found["data"][FILE]
    for name, text in files.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, FILE)
            path.write_text(text)
            try:
                settings = read_settings({ENV: str(path)})
                assert settings is not None
                settings.source_rules()
                settings.access_settings()
                if (settings.registry is None) == (settings.registry_file is None):
                    raise ConfigError("set exactly one of `registry` and `registry_file`.")
            except ConfigError as error:
                errors.append(f"{name}: {str(error).replace(str(path), FILE)}")
    return errors


def of_text(text: str, kubernetes: str) -> Iterator[str]:
    """Errors of every object in a YAML text."""
    objects = [found for found in yaml.safe_load_all(text) if found is not None]
    if not objects:
        yield "contains no objects"
    for found in objects:
        for error in of_object(found, kubernetes):
            name = found.get("metadata", {}).get("name")
            yield f"{found.get('kind')} {name} (Kubernetes {kubernetes}): {error}"


def of_object(found: Object, kubernetes: str) -> Iterator[str]:
    """Errors of one object."""
    for key in ("apiVersion", "kind"):
        if not isinstance(found.get(key), str):
            yield f"has no {key}"
            return
    custom = CUSTOM.get((found["apiVersion"], found["kind"]))
    if custom is not None:
        yield from custom(found, kubernetes)
        return
    try:
        kubernetes_validate.validate(dict(found), kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield (
            f"{found['apiVersion']} is not of this release of Kubernetes, nor listed in "
            "deploy/check/objects.py"
        )


def _operator(found: Object, _kubernetes: str) -> Iterator[str]:
    """An object of the Prometheus operator, through models generated from its CRDs.

    The models drop unknown fields, so the result is compared with the input.
    """
    from cloudcoil.models.prometheus_operator import v1
    from pydantic import ValidationError

    try:
        model = getattr(v1, found["kind"]).model_validate(found)
    except ValidationError as error:
        for detail in error.errors():
            yield f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        return
    known = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    yield from (f"{path}: no such field" for path in _unknown_fields(found, known, ""))


def _unknown_fields(given: Any, known: Any, path: str) -> Iterator[str]:
    if isinstance(given, Mapping) and isinstance(known, Mapping):
        for key, value in given.items():
            field = f"{path}.{key}".lstrip(".")
            if key in known:
                yield from _unknown_fields(value, known[key], field)
            else:
                yield field
    elif isinstance(given, list) and isinstance(known, list):
        for number, (one, other) in enumerate(zip(given, known, strict=False)):
            yield from _unknown_fields(one, other, f"{path}.{number}")


LLM_SERVICE_SPEC = {"model", "replicas", "router", "template", "baseRefs", "worker", "prefill"}
"""Fields of spec, from KServe's guide to LLMInferenceService and its samples."""


def _llm_service(found: Object, kubernetes: str) -> Iterator[str]:
    """KServe's LLMInferenceService: its template is a PodSpec."""
    spec = found.get("spec", {})
    yield from (f"spec.{key}: not among the known fields" for key in set(spec) - LLM_SERVICE_SPEC)
    if not spec.get("model", {}).get("uri"):
        yield "spec.model.uri is missing"
    names = [container.get("name") for container in spec["template"]["containers"]]
    if names != ["main"]:
        yield f"spec.template.containers are {names}: KServe's own is called main"
    yield from _pod(spec["template"], "spec.template", kubernetes)


def _ray_service(found: Object, kubernetes: str) -> Iterator[str]:
    """KubeRay's RayService: pods of the cluster, and a Serve configuration in a string."""
    spec = found["spec"]
    cluster = spec["rayClusterConfig"]
    groups = {"headGroupSpec": cluster["headGroupSpec"]}
    for number, group in enumerate(cluster.get("workerGroupSpecs", ())):
        groups[f"workerGroupSpecs.{number}"] = group
    for name, group in groups.items():
        yield from _pod(group["template"]["spec"], f"{name}.template.spec", kubernetes)
    try:
        served = yaml.safe_load(spec["serveConfigV2"])
    except yaml.YAMLError as error:
        yield f"spec.serveConfigV2 is no YAML: {error}"
        return
    for application in served["applications"]:
        if application.get("import_path") != "ray.serve.llm:build_openai_app":
            yield f"import_path {application.get('import_path')!r} is not Ray Serve LLM's builder"
        for config in application["args"]["llm_configs"]:
            if "model_loading_config" not in config:
                yield f"{application['name']}: an llm_config without model_loading_config"


def _pod(spec: Object, path: str, kubernetes: str) -> Iterator[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inside"}, "spec": spec}
    yield from (f"{path}: {error}" for error in of_object(pod, kubernetes))


CUSTOM: Mapping[tuple[str, str], Callable[[Object, str], Iterator[str]]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _operator,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _operator,
    ("serving.kserve.io/v1alpha2", "LLMInferenceService"): _llm_service,
    ("ray.io/v1", "RayService"): _ray_service,
}
