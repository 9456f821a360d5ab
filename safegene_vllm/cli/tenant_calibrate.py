"""`safegene tenant calibrate`: coefficients found by a running server, on its own engine.

The examples are read and drawn here and sent to the server. For a calibration on this machine, with
a second copy of the model and gradients, there is `safegene calibrate`.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from safegene_vllm.cli.remote import (
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
from safegene_vllm.cli.tenant_options import Name
from safegene_vllm.errors import ConfigError


def calibrate(
    name: Name,
    safety: Annotated[
        list[str],
        typer.Option(
            help="Harmful prompts, with safe answers or without; a data source as of `safegene "
            "calibrate`, e.g. --safety 'advbench.csv?licence=MIT'."
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            help="The tenant's own task: prompts, with answers or without, e.g. --task "
            "'reviews.jsonl?licence=private'."
        ),
    ],
    benign: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmless prompts that must still be answered, e.g. --benign "
            "'lookalike.jsonl?licence=MIT'."
        ),
    ] = None,
    shots: Annotated[int, typer.Option(help="Examples drawn of each kind, e.g. --shots 32.")] = 16,
    seed: Annotated[int, typer.Option(help="Draws the examples, e.g. --seed 1.")] = 0,
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
    from safegene_vllm.cli.data import read_all
    from safegene_vllm.recipe.shots import check_classes, few

    read = {
        "safety": read_all(safety, "safety data"),
        "task": read_all(task, "task data", labels=True),
        "benign": read_all(benign or [], "benign data"),
    }
    drawn = {kind: few(data, shots, seed) for kind, data in read.items() if data is not None}
    if "safety" not in drawn or "task" not in drawn:
        raise ConfigError("give --safety and --task: calibration needs examples of both")
    check_classes(drawn["task"])
    examples = {
        kind: [{"prompt": row.prompt, "answer": row.answer} for row in data.rows]
        for kind, data in drawn.items()
    }
    records = {kind: data.record() for kind, data in drawn.items()}
    with connect(url, key, key_file) as client:
        answer: dict[str, Any] = dict(
            client.calibrate(name, examples, data=records, seed=seed, expected_revision=expect)
        )
        if wait:
            answer["job"] = follow_job(client, answer["job"], timeout)
    if as_json:
        show_json(answer)
    else:
        show_job(answer["job"])
    end_with(answer["job"])
