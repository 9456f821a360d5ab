"""Checks of Kubernetes objects: the chart's, and those written for KServe and Ray.

What Kubernetes defines is validated strictly against its schemas, for every release in
chart.KUBERNETES. Other kinds are only let through if they are named here, with what can be said
about them: a model made from the operator's own CRDs, or the pods inside them. Not for admission,
defaults or controllers: there is no API server in it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from deploy.check import chart

Object = Mapping[str, Any]

VALUES = {"engines.yaml", "router.yaml"}
"""Values for the chart of the production-stack, which is not here to be rendered."""


def rendered_and_written(root: Path) -> list[str]:
    """The chart with every file of ci/, and the objects that are written for other operators."""
    faults = []
    folder = chart.chart_of(root)
    for kubernetes in chart.KUBERNETES:
        for values in sorted(folder.glob("ci/*.yaml")):
            try:
                text = chart.render(folder, values, kubernetes)
            except subprocess.CalledProcessError as error:
                faults.append(f"ci/{values.name}: {error.stderr.strip()}")
                continue
            faults += [f"ci/{values.name}: {fault}" for fault in of_text(text, kubernetes)]
        for path in written(root):
            name = path.relative_to(root / "deploy")
            faults += [f"{name}: {fault}" for fault in of_text(path.read_text(), kubernetes)]
    return list(dict.fromkeys(faults))


def written(root: Path) -> list[Path]:
    """Files of whole objects; values for somebody else's chart are none."""
    parts = ("kserve", "production-stack", "ray")
    found = [p for part in parts for p in (root / "deploy" / part).glob("*.yaml")]
    return sorted(path for path in found if path.name not in VALUES)


def of_text(text: str, kubernetes: str) -> Iterator[str]:
    """Faults of every object in a YAML text."""
    objects = [found for found in yaml.safe_load_all(text) if found is not None]
    if not objects:
        yield "holds no objects"
    for found in objects:
        for fault in of_object(found, kubernetes):
            name = found.get("metadata", {}).get("name")
            yield f"{found.get('kind')} {name} (Kubernetes {kubernetes}): {fault}"


def of_object(found: Object, kubernetes: str) -> Iterator[str]:
    """Faults of one object."""
    for key in ("apiVersion", "kind"):
        if not isinstance(found.get(key), str):
            yield f"has no {key}"
            return
    known = CUSTOM.get((found["apiVersion"], found["kind"]))
    if known is not None:
        yield from known(found, kubernetes)
        return
    try:
        kubernetes_validate.validate(dict(found), kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        where = ".".join(str(part) for part in error.path)
        yield f"{where}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield (
            f"{found['apiVersion']} is not of this release of Kubernetes, nor named in "
            "deploy/check/objects.py"
        )


def _operator(found: Object, _kubernetes: str) -> Iterator[str]:
    """An object of the Prometheus operator, through models generated from its CRDs.

    The models drop fields that they do not know, so what comes out is compared with what went in.
    """
    from cloudcoil.models.prometheus_operator import v1
    from pydantic import ValidationError

    try:
        model = getattr(v1, found["kind"]).model_validate(found)
    except ValidationError as error:
        for fault in error.errors():
            yield f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        return
    kept = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    yield from (f"{place}: no such field" for place in _lost(found, kept, ""))


def _lost(given: Any, kept: Any, place: str) -> Iterator[str]:
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        for key, value in given.items():
            here = f"{place}.{key}".lstrip(".")
            if key in kept:
                yield from _lost(value, kept[key], here)
            else:
                yield here
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=False)):
            yield from _lost(one, other, f"{place}.{number}")


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


def _pod(spec: Object, place: str, kubernetes: str) -> Iterator[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "inside"}, "spec": spec}
    for fault in of_object(pod, kubernetes):
        yield f"{place}: {fault}"


CUSTOM: Mapping[tuple[str, str], Callable[[Object, str], Iterator[str]]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _operator,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _operator,
    ("serving.kserve.io/v1alpha2", "LLMInferenceService"): _llm_service,
    ("ray.io/v1", "RayService"): _ray_service,
}
