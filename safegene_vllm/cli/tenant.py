"""`safegene tenant ...`: tenants of a running server. The work is the server's; see client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    Expected,
    KeyFile,
    KeyText,
    Timeout,
    Url,
    Wait,
    cell,
    connect,
    end_with,
    follow_job,
    follow_rollout,
    show_facts,
    show_job,
    show_json,
    show_list,
    show_rollout,
)
from safegene_vllm.cli.console import coefficient_table, results
from safegene_vllm.cli.tenant_calibrate import calibrate, calibration_of_new
from safegene_vllm.cli.tenant_options import (
    SEED,
    SHOTS,
    Coefficient,
    Coefficients,
    Limit,
    Name,
    NewBenign,
    NewSafety,
    NewSeed,
    NewShots,
    NewTask,
    Profile,
    Publish,
    Source,
    given_change,
    parse_limits,
)
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.client import Client

HELP = "Tenants of a running server: add, look at, change, roll back, take away."
_FACTS = ("state", "served", "family", "source", "limits", "created_at")
_REVISION = ("number", "state", "kind", "created_at", "created_by", "reasons")


def add(
    name: Name,
    source: Source = None,
    profile: Profile = None,
    coefficient: Coefficient = None,
    coefficients: Coefficients = None,
    calibrate_safety: NewSafety = None,
    calibrate_task: NewTask = None,
    calibrate_benign: NewBenign = None,
    calibrate_shots: NewShots = SHOTS,
    calibrate_seed: NewSeed = SEED,
    limit: Limit = None,
    publish: Publish = True,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Bring in a tenant: fetched, checked, loaded, tried, published, or kept with the reasons.

    Without --source it is nothing but a profile on the base. Without --profile or coefficients, the
    safegene.json beside its adapter is taken; or with --calibrate-safety and --calibrate-task, the
    server finds coefficients from examples, which leave this machine for it.

    Example: safegene tenant add acme/support --source s3://models/acme/support --limit concurrent=8
    """
    limits, change = parse_limits(limit or []), given_change(coefficient, coefficients, profile)
    data = calibrate_safety, calibrate_task, calibrate_benign
    change |= calibration_of_new(change, *data, calibrate_shots, calibrate_seed)
    if source is None and "calibrate" in change:
        raise ConfigError("give --source: what --calibrate-... finds is for its adapter")
    if source is None and not change:
        raise ConfigError("give --source, or --profile or coefficients for a tenant without one")
    with connect(url, key, key_file) as client:
        started = client.add_tenant(name, source=source, limits=limits, publish=publish, **change)
        _show_started(client, name, dict(started), wait, timeout, as_json)


def list_(
    as_json: AsJson = False, url: Url = LOCAL, key: KeyText = None, key_file: KeyFile = None
) -> None:
    """The tenants this key may see.

    Example: safegene tenant list --json
    """
    with connect(url, key, key_file) as client:
        found = client.tenants()
    show_list(found, ("name", "state", "served", "limits", "source", "created_at"), as_json)


def show(
    name: Name,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """One tenant: what is served, its revisions, why one failed, its coefficients.

    Example: safegene tenant show acme/support
    """
    with connect(url, key, key_file) as client:
        tenant, revisions = client.tenant(name), client.revisions(name)
    if as_json:
        show_json({"tenant": tenant, "revisions": revisions})
        return
    results().print(cell(tenant["name"]))
    show_facts(tenant, _FACTS)
    show_list(revisions, _REVISION, False)
    for revision in revisions:
        if revision["number"] == tenant["published"]:
            results().print(coefficient_table(revision["coefficients"]))


def update(
    name: Name,
    source: Source = None,
    profile: Profile = None,
    coefficient: Coefficient = None,
    coefficients: Coefficients = None,
    calibrate_safety: NewSafety = None,
    calibrate_task: NewTask = None,
    calibrate_benign: NewBenign = None,
    calibrate_shots: NewShots = SHOTS,
    calibrate_seed: NewSeed = SEED,
    publish: Publish = True,
    expect: Expected = None,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Bring in new weights of a tenant as its next revision; the last one serves until then.

    Without --source, what the tenant came from is read again. Coefficients as of `tenant add`.

    Example: safegene tenant update acme/support --source s3://models/acme/support-2
    """
    change = given_change(coefficient, coefficients, profile)
    data = calibrate_safety, calibrate_task, calibrate_benign
    change |= calibration_of_new(change, *data, calibrate_shots, calibrate_seed)
    with connect(url, key, key_file) as client:
        started = client.add_revision(
            name, source=source, publish=publish, expected_revision=expect, **change
        )
        _show_started(client, name, dict(started), wait, timeout, as_json)


def set_(
    name: Name,
    scale: Annotated[
        float | None,
        typer.Option(help="Multiply the coefficients served now, e.g. --scale 1.2."),
    ] = None,
    coefficient: Coefficient = None,
    coefficients: Coefficients = None,
    profile: Profile = None,
    limit: Limit = None,
    expect: Expected = None,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Change a tenant's coefficients, or its limits. For new weights there is `tenant update`.

    New coefficients are live when the server answers; requests under way finish on the old ones.
    --limit names all limits that the tenant is to have; --limit none lifts them.

    Example: safegene tenant set acme/support --coefficients 3-5:0.8 --expect 3
    """
    change = given_change(coefficient, coefficients, profile)
    if scale is not None:
        change["scale"] = scale
    if len(change) + bool(limit) != 1:
        raise ConfigError(
            "give one of --scale, --coefficient, --coefficients, --profile and --limit"
        )
    if limit and expect is not None:
        raise ConfigError("--expect goes with what makes a revision; --limit makes none")
    limits = parse_limits(limit or [])
    with connect(url, key, key_file) as client:
        if limit:
            _show_tenant(client.set_limits(name, limits), as_json)
        else:
            changed = client.change_profile(name, expected_revision=expect, **change)
            _show_change(client, dict(changed), wait, timeout, as_json)


def publish(
    name: Name,
    number: Annotated[
        int, typer.Argument(metavar="N", help="A revision that is ready, or was served, e.g. 4.")
    ],
    expect: Expected = None,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Serve a revision that was brought in with --no-publish.

    Example: safegene tenant publish acme/support 4
    """
    with connect(url, key, key_file) as client:
        changed = client.publish(name, number, expected_revision=expect)
        _show_change(client, dict(changed), wait, timeout, as_json)


def rollback(
    name: Name,
    number: Annotated[
        int | None,
        typer.Option(
            "--to", metavar="N", help="Which revision (default: the one before), e.g. --to 2."
        ),
    ] = None,
    expect: Expected = None,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Publish an earlier revision again.

    Example: safegene tenant rollback acme/support
    """
    with connect(url, key, key_file) as client:
        changed = client.rollback(name, number, expected_revision=expect)
        _show_change(client, dict(changed), wait, timeout, as_json)


def retire(
    name: Name,
    expect: Expected = None,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Serve a tenant no more. Its history stays.

    Example: safegene tenant retire acme/support
    """
    with connect(url, key, key_file) as client:
        answer = client.retire_tenant(name, expected_revision=expect)
        if wait and answer["rollout"] is not None:
            answer["rollout"] = follow_rollout(client, answer["rollout"], timeout)
    if as_json:
        show_json(answer)
        return
    results().print(f"{cell(name)} is retired")
    if answer["rollout"] is not None:
        show_rollout(answer["rollout"])


def freeze(
    name: Name,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Refuse every change of what a tenant is served from; serving goes on.

    Example: safegene tenant freeze acme/support
    """
    with connect(url, key, key_file) as client:
        _show_tenant(client.freeze_tenant(name), as_json)


def unfreeze(
    name: Name,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Let a tenant be changed again.

    Example: safegene tenant unfreeze acme/support
    """
    with connect(url, key, key_file) as client:
        _show_tenant(client.unfreeze_tenant(name), as_json)


def _show_tenant(tenant: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(tenant)
        return
    results().print(cell(tenant["name"]))
    show_facts(tenant, _FACTS)


def _show_started(
    client: Client,
    name: str,
    answer: dict[str, Any],
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """The tenant and the job; with `wait` at its end, and what it published on every replica.

    Exit 1 if the job did not do its work.
    """
    if wait:
        answer["job"] = job = follow_job(client, answer["job"], timeout_s)
        published = (job["result"] or {}).get("rollout")
        if published is not None:
            answer["rollout"] = follow_rollout(client, client.rollout(published), timeout_s)
        answer["tenant"] = client.tenant(name)
    if as_json:
        show_json(answer)
    else:
        _show_tenant(answer["tenant"], False)
        show_job(answer["job"])
        if "rollout" in answer:
            show_rollout(answer["rollout"])
    end_with(answer["job"])


def _show_change(
    client: Client, answer: dict[str, Any], wait: bool, timeout_s: float | None, as_json: bool
) -> None:
    """The revision that is published now and its rollout, on every replica with `wait`."""
    rollout = answer["rollout"]
    if wait and rollout is not None:
        answer["rollout"] = rollout = follow_rollout(client, rollout, timeout_s)
    if as_json:
        show_json(answer)
        return
    results().print(f"{cell(answer['revision']['name'])} is published")
    results().print(coefficient_table(answer["revision"]["coefficients"]))
    if rollout is not None:
        show_rollout(rollout)


COMMANDS = {
    "add": add,
    "list": list_,
    "show": show,
    "update": update,
    "set": set_,
    "publish": publish,
    "rollback": rollback,
    "retire": retire,
    "freeze": freeze,
    "unfreeze": unfreeze,
    "calibrate": calibrate,
}
