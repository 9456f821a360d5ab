"""`safegene tenant calibrate`: coefficients found by a running server, on its own engine.

The examples are read and drawn here and sent to the server. For a calibration on this machine, with
a second copy of the model and gradients, there is `safegene calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegene_vllm.cli.client_options import (
    LOCAL,
    AsJson,
    Expected,
    KeyFile,
    KeyText,
    Timeout,
    Url,
    Wait,
    connect,
    end_with,
    follow_job,
    show_job,
    show_json,
)
from safegene_vllm.cli.tenant_options import (
    OF_NEW,
    SEED,
    SHOTS,
    Benign,
    Name,
    Publish,
    Safety,
    Seed,
    Shots,
    Task,
)
from safegene_vllm.errors import ConfigError


def calibrate(
    name: Name,
    safety: Safety,
    task: Task,
    benign: Benign = None,
    shots: Shots = SHOTS,
    seed: Seed = SEED,
    publish: Publish = True,
    expect: Expected = None,
    wait: Wait = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: KeyText = None,
    key_file: KeyFile = None,
) -> None:
    """Find a tenant's coefficients on the running server, from a few examples.

    The examples leave this machine for the server. Its answers to others go on meanwhile.

    Example: safegene tenant calibrate acme/support --safety 'advbench.csv?licence=MIT' --task
    'tickets.jsonl?licence=private'
    """
    given = _drawn(safety, task, benign, shots, seed)
    with connect(url, key, key_file) as client:
        begun = client.calibrate(name, **given, publish=publish, expected_revision=expect)
        answer: dict[str, Any] = dict(begun)
        if wait:
            answer["job"] = follow_job(client, answer["job"], timeout)
    if as_json:
        show_json(answer)
    else:
        show_job(answer["job"])
    end_with(answer["job"])


def calibration_of_new(
    change: Mapping[str, Any],
    safety: list[str] | None,
    task: list[str] | None,
    benign: list[str] | None,
    shots: int,
    seed: int,
) -> dict[str, Any]:
    """`calibrate` of new content as the client takes it; nothing if no data are given.

    Errors: ConfigError, also if `change` gives coefficients besides.
    """
    if not (safety or task or benign):
        return {}
    if change:
        raise ConfigError(f"{OF_NEW}... and coefficients or a profile are given; give one of them")
    return {"calibrate": _drawn(safety or [], task or [], benign, shots, seed, prefix=OF_NEW)}


def _drawn(
    safety: list[str],
    task: list[str],
    benign: list[str] | None,
    shots: int,
    seed: int,
    *,
    prefix: str = "--",
) -> dict[str, Any]:
    """`examples`, `data` and `seed` as the server takes them: what was drawn of each data source.

    `prefix` is how the options begin that named them. Errors: ConfigError.
    """
    from safegene_vllm.cli.data import read_all
    from safegene_vllm.recipe.examples import check_classes, sample_rows

    read = {
        "safety": read_all(safety, "safety data"),
        "task": read_all(task, "task data", labels=True),
        "benign": read_all(benign or [], "benign data"),
    }
    found = {
        kind: sample_rows(data, shots, seed) for kind, data in read.items() if data is not None
    }
    if "safety" not in found or "task" not in found:
        raise ConfigError(
            f"give {prefix}safety and {prefix}task: calibration needs examples of both"
        )
    check_classes(found["task"])
    examples = {
        kind: [{"prompt": row.prompt, "answer": row.answer} for row in data.rows]
        for kind, data in found.items()
    }
    return {
        "examples": examples,
        "data": {kind: data.record() for kind, data in found.items()},
        "seed": seed,
    }
