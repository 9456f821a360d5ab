"""`safegene probe ...`: refusal and coherence rates that a running server measures per tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegene_vllm.cli.client_options import AsJson, Server, Waiting, print_job, show_list

if TYPE_CHECKING:
    from safegene_vllm.client.schemas import Probe

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
        job = waiting.job(client, started.job)
    print_job({"tenant": started.tenant, "job": job}, job, as_json)


def _row(found: Probe) -> dict[str, Any]:
    """One line of the table; a rate as `25 % of 12`."""
    result = found.result
    row = {"served": found.served, "outcome": found.outcome, "message": found.message}
    if result is None:
        return row
    rates = {
        "attack_success": result.attack_success,
        "over_refusal": result.over_refusal,
        "coherent": result.coherent,
    }
    shown = {name: f"{100 * rate.rate:.0f} % of {rate.n}" for name, rate in rates.items()}
    return {**row, "at": result.at, **shown}


COMMANDS = {"list": list_, "run": run}
