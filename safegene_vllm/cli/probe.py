"""`safegene probe ...`: what a running server counts of its tenants' answers to a few questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    KeyFile,
    KeyText,
    Timeout,
    Url,
    Wait,
    cell,
    connect,
    end_with,
    follow_job,
    show_job,
    show_json,
    show_list,
)

HELP = "A few questions asked of what tenants serve: refusals and coherence, counted."


def list_(
    as_json: AsJson = False, url: Url = LOCAL, key: KeyText = None, key_file: KeyFile = None
) -> None:
    """Every tenant's last counts on the replica that answers: share and number of questions.

    Example: safegene probe list
    """
    with connect(url, key, key_file) as client:
        found = client.probes()
    columns = ("served", "outcome", "attack_success", "over_refusal", "coherent", "at", "message")
    show_list(found if as_json else map(_row, found), columns, as_json)


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A tenant, e.g. acme/support.")],
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Probe what a tenant serves now. Bad counts are no failure: exit code 1 is a probe that ended
    before it was whole.

    Example: safegene probe run acme/support
    """
    with connect(url, key, key_file) as client:
        answer: dict[str, Any] = dict(client.probe(name))
        if wait:
            answer["job"] = follow_job(client, answer["job"], timeout)
    if as_json:
        show_json(answer)
    else:
        show_job(answer["job"])
    end_with(answer["job"])


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table; a rate as `25 % of 12`."""
    result: Mapping[str, Any] = found["result"] or {}
    row = {**found, "at": result.get("at", "-")}
    for name in ("attack_success", "over_refusal", "coherent"):
        rate = result.get(name)
        row[name] = rate and f"{100 * rate['rate']:.0f} % of {cell(rate['n'])}"
    return row


COMMANDS = {"list": list_, "run": run}
