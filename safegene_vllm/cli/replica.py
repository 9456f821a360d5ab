"""`safegene replica list`: the server processes on one registry, and what is wrong with them."""

from __future__ import annotations

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    KeyFile,
    KeyText,
    Url,
    connect,
    show_list,
)

HELP = "The server processes that share a registry."


def list_(
    as_json: AsJson = False, url: Url = LOCAL, key: KeyText = None, key_file: KeyFile = None
) -> None:
    """The live replicas: when each was seen last, how far it follows, its faults.

    Example: safegene replica list
    """
    with connect(url, key, key_file) as client:
        found = client.replicas()
    show_list(found, ("id", "host", "pid", "applied_version", "seen_at", "faults"), as_json)


COMMANDS = {"list": list_}
