"""`safegene tenant ...`: tenants of a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.client_options import (
    FAILED,
    AsJson,
    Expected,
    Server,
    Waiting,
    cell,
    end_with,
    print_job,
    show_facts,
    show_job,
    show_json,
    show_list,
    show_next,
    show_rollout,
)
from safegene_vllm.cli.console import coefficient_table, notes, results
from safegene_vllm.cli.tenant_options import (
    SEED,
    SHOTS,
    Benign,
    CalibrationOptions,
    CoefficientOptions,
    Limit,
    Name,
    Publish,
    Safety,
    Seed,
    Shots,
    Source,
    Task,
    draw_examples,
    parse_limits,
)
from safegene_vllm.cli.tenant_protect import protect
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.client import Client
    from safegene_vllm.client.schemas import Onboarding, Switched, Tenant

HELP = "Protect an adapter; add, show, change, calibrate, retire tenants of a running server."
_FACTS = ("state", "served", "failure", "family", "source", "limits", "created_at")
_REVISION = ("number", "state", "kind", "created_at", "created_by", "reasons")


def add(
    name: Name,
    change: CoefficientOptions,
    calibration: CalibrationOptions,
    waiting: Waiting,
    server: Server,
    source: Source = None,
    limit: Limit = None,
    publish: Publish = True,
    as_json: AsJson = False,
) -> None:
    """Add a tenant: fetch, check, load and smoke-test it, then publish it or report the errors.

    Without --source it is a profile on the base model. Without --profile or coefficients, the
    safegene.json next to its adapter is used; with --calibrate-safety and --calibrate-task, the
    server finds coefficients from examples, which are sent to it.

    Example: safegene tenant add acme/support --source s3://models/acme/support --limit concurrent=8
    """
    limits, content = parse_limits(limit or []), calibration.added_to(change.change())
    if source is None and "calibrate" in content:
        raise ConfigError("give --source: --calibrate-... finds coefficients for its adapter")
    if source is None and not content:
        raise ConfigError("give --source, or --profile or coefficients for a tenant without one")
    with server.connect() as client:
        content |= change.change(lambda: _carried(client, None))
        started = client.add_tenant(name, source=source, limits=limits, publish=publish, **content)
        _print_started(client, started, waiting, as_json)


def list_(
    server: Server,
    all_: Annotated[
        bool, typer.Option("--all", help="Also those that are retired, e.g. --all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the tenants this key may see; `failed` are those that serve nothing, and why.

    Example: safegene tenant list --all
    """
    with server.connect() as client:
        found = client.tenants()
    columns = ("name", "state", "served", "limits", "source", "created_at")
    if as_json:
        show_list(found, columns, True)
        return
    shown = [tenant for tenant in found if all_ or tenant.state != "retired"]
    rows = [{**dict(t), **({"state": "failed"} if t.failure else {})} for t in shown]
    show_list(rows, columns, False)
    for tenant in shown:
        if tenant.failure:
            notes().print(f"{cell(tenant.name)}: {cell(tenant.failure)}")
    if hidden := len(found) - len(shown):
        notes().print(f"{hidden} retired; show them with --all")


def show(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Show a tenant: the served revision, all revisions, why one failed, its coefficients.

    Example: safegene tenant show acme/support
    """
    with server.connect() as client:
        tenant, revisions = client.tenant(name), client.revisions(name)
    if as_json:
        show_json({"tenant": tenant, "revisions": revisions})
        return
    _print_tenant(tenant, False)
    show_list(revisions, _REVISION, False)
    for revision in revisions:
        if revision.number == tenant.published:
            results().print(coefficient_table(revision.coefficients))


def update(
    name: Name,
    change: CoefficientOptions,
    calibration: CalibrationOptions,
    waiting: Waiting,
    server: Server,
    source: Source = None,
    publish: Publish = True,
    expect: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Publish new weights of a tenant as its next revision; the last one serves until then.

    Without --source, the tenant's own source is read again. Coefficients as of `tenant add`.

    Example: safegene tenant update acme/support --source s3://models/acme/support-2
    """
    content = calibration.added_to(change.change())
    with server.connect() as client:
        content |= change.change(lambda: _carried(client, name))
        started = client.add_revision(
            name, source=source, publish=publish, expected_revision=expect, **content
        )
        _print_started(client, started, waiting, as_json)


def set_(
    name: Name,
    change: CoefficientOptions,
    waiting: Waiting,
    server: Server,
    scale: Annotated[
        float | None,
        typer.Option(help="Multiply the coefficients served now, e.g. --scale 1.2."),
    ] = None,
    limit: Limit = None,
    expect: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Change a tenant's coefficients or limits. For new weights there is `tenant update`.

    New coefficients are live when the server responds; running requests finish on the old ones.
    --limit names all limits that the tenant is to have; --limit none lifts them.

    Example: safegene tenant set acme/support --coefficients 3-5:0.8 --expect 3
    """
    content = change.change() | ({} if scale is None else {"scale": scale})
    if len(content) + bool(limit) != 1:
        raise ConfigError(
            "give one of --scale, --coefficient, --coefficients, --profile and --limit"
        )
    if limit and expect is not None:
        raise ConfigError("--expect is for changes that make a revision; --limit makes none")
    limits = parse_limits(limit or [])
    with server.connect() as client:
        if limit:
            _print_tenant(client.set_limits(name, limits), as_json)
        else:
            content |= change.change(lambda: _carried(client, name))
            changed = client.change_profile(name, expected_revision=expect, **content)
            _print_change(client, changed, waiting, as_json)


def publish(
    name: Name,
    number: Annotated[
        int, typer.Argument(metavar="N", help="A revision that is ready, or was served, e.g. 4.")
    ],
    waiting: Waiting,
    server: Server,
    expect: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Publish a revision that was added with --no-publish.

    Example: safegene tenant publish acme/support 4
    """
    with server.connect() as client:
        changed = client.publish(name, number, expected_revision=expect)
        _print_change(client, changed, waiting, as_json)


def rollback(
    name: Name,
    waiting: Waiting,
    server: Server,
    number: Annotated[
        int | None,
        typer.Option(
            "--to", metavar="N", help="Which revision (default: the one before), e.g. --to 2."
        ),
    ] = None,
    expect: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Publish an earlier revision again.

    Example: safegene tenant rollback acme/support
    """
    with server.connect() as client:
        changed = client.rollback(name, number, expected_revision=expect)
        _print_change(client, changed, waiting, as_json)


def retire(
    name: Name,
    waiting: Waiting,
    server: Server,
    expect: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Stop serving a tenant. Its history stays.

    Example: safegene tenant retire acme/support
    """
    with server.connect() as client:
        response = client.retire_tenant(name, expected_revision=expect)
        rollout = waiting.rollout(client, response.rollout)
    if as_json:
        show_json({"tenant": response.tenant, "rollout": rollout})
        return
    results().print(f"{cell(name)} is retired")
    show_rollout(rollout)


def delete(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Give up a tenant that never served anything. Its name can be added again.

    Example: safegene tenant delete acme/support
    """
    with server.connect() as client:
        tried = client.revisions(name)
        served = [one.name for one in tried if one.state in ("published", "superseded", "retired")]
        if served:
            raise ConfigError(
                f"{name} has served {', '.join(served[-3:])}; its history stays, so retire it: "
                f"safegene tenant retire {name}"
            )
        response = client.retire_tenant(name, expected_revision=0)
    if as_json:
        show_json(response.tenant)
        return
    results().print(f"{cell(name)} is deleted; the name can be added again")


def freeze(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Reject every change of a tenant's content; serving continues.

    Example: safegene tenant freeze acme/support
    """
    with server.connect() as client:
        _print_tenant(client.freeze_tenant(name), as_json)


def unfreeze(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Allow changes of a tenant again.

    Example: safegene tenant unfreeze acme/support
    """
    with server.connect() as client:
        _print_tenant(client.unfreeze_tenant(name), as_json)


def calibrate(
    name: Name,
    safety: Safety,
    task: Task,
    waiting: Waiting,
    server: Server,
    benign: Benign = None,
    shots: Shots = SHOTS,
    seed: Seed = SEED,
    publish: Publish = True,
    expect: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Calibrate a tenant's coefficients on the running server's engine, from a few examples.

    The examples are read here and sent to the server, which keeps serving meanwhile. To calibrate
    on this machine, with gradients, use `safegene calibrate`.

    Example: safegene tenant calibrate acme/support --safety 'advbench.csv?licence=MIT' --task
    'tickets.jsonl?licence=private'
    """
    examples = draw_examples(safety, task, benign, shots, seed)
    with server.connect() as client:
        started = client.calibrate(name, **examples, publish=publish, expected_revision=expect)
        job = waiting.job(client, started.job)
    print_job({"tenant": started.tenant, "job": job}, job, as_json)


def _carried(client: Client, name: str | None) -> list[int]:
    """Return the layers with a vector: of a tenant's family, or of the server's only one."""
    if name is not None:
        return client.family(client.tenant(name).family).layers
    families = client.families()
    if len(families) != 1:
        raise ConfigError(
            f"this server has {len(families)} families, so a range of layers is ambiguous; give "
            "each layer, or --coefficient"
        )
    return families[0].layers


def _print_tenant(tenant: Tenant, as_json: bool) -> None:
    if as_json:
        show_json(tenant)
        return
    results().print(cell(tenant.name))
    show_facts(tenant, _FACTS)


def _print_started(client: Client, started: Onboarding, waiting: Waiting, as_json: bool) -> None:
    """Print the tenant and the job; if waiting, at its end, with the rollout it started.

    Exit 1 if the job failed.
    """
    tenant, job, rollout = started.tenant, started.job, None
    if waiting.wait:
        job = waiting.job(client, job)
        number = (job.result or {}).get("rollout")
        if number is not None:
            rollout = waiting.rollout(client, client.rollout(number))
        tenant = client.tenant(tenant.name)
    if as_json:
        response = {"tenant": tenant, "job": job}
        show_json(response if rollout is None else {**response, "rollout": rollout})
    elif job.state in FAILED:
        show_next(tenant)
    else:
        _print_tenant(tenant, False)
        show_job(job)
        show_rollout(rollout)
    end_with(job)


def _print_change(client: Client, change: Switched, waiting: Waiting, as_json: bool) -> None:
    """Print the revision that is published now and its rollout."""
    revision, rollout = change.revision, waiting.rollout(client, change.rollout)
    if as_json:
        show_json({"revision": revision, "rollout": rollout})
        return
    results().print(f"{cell(revision.name)} is published")
    results().print(coefficient_table(revision.coefficients))
    show_rollout(rollout)


COMMANDS = {
    "protect": protect,
    "add": add,
    "list": list_,
    "show": show,
    "update": update,
    "set": set_,
    "publish": publish,
    "rollback": rollback,
    "retire": retire,
    "delete": delete,
    "freeze": freeze,
    "unfreeze": unfreeze,
    "calibrate": calibrate,
}
