"""`safegene replica list`: the server processes that share a registry, and their errors."""

from __future__ import annotations

from safegene_vllm.cli.client_options import AsJson, Server, show_list

HELP = "List the server processes that share a registry."


def list_(server: Server, as_json: AsJson = False) -> None:
    """List live replicas: last heartbeat, applied version, errors.

    Example: safegene replica list
    """
    with server.connect() as client:
        found = client.replicas()
    show_list(found, ("id", "host", "pid", "applied_version", "seen_at", "faults"), as_json)


COMMANDS = {"list": list_}
