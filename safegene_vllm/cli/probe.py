"""`safegene probe ...`: refusal and coherence rates that a running server measures per tenant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from safegene_vllm.cli.client_options import AsJson, Server, Waiting, cell, print_job, show_list

HELP = "Measure refusals and coherence of served tenants on a few prompts."


def list_(server: Server, as_json: AsJson = False) -> None:
    """List every tenant's last probe on the responding replica: rates and number of prompts.

    Example: safegene probe list
    """
    with server.connect() as client:
        found = client.probes()
    columns = ("served", "outcome", "attack_success", "over_refusal", "coherent", "at", "message")
    show_list(found if as_json else map(_row, found), columns, as_json)


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A tenant, e.g. acme/support.")],
    waiting: Waiting,
    server: Server,
    as_json: AsJson = False,
) -> None:
    """Probe the revision a tenant serves now.

    Bad rates are no failure; exit code 1 is a probe that did not complete.

    Example: safegene probe run acme/support
    """
    with server.connect() as client:
        started = client.probe(name)
        response = {**started, "job": waiting.job(client, started["job"])}
    print_job(response, as_json)


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table; a rate as `25 % of 12`."""
    result: Mapping[str, Any] = found["result"] or {}
    row = {**found, "at": result.get("at", "-")}
    for name in ("attack_success", "over_refusal", "coherent"):
        rate = result.get(name)
        row[name] = rate and f"{100 * rate['rate']:.0f} % of {cell(rate['n'])}"
    return row


COMMANDS = {"list": list_, "run": run}
