"""`safegene serve MODEL [options] [any vLLM flag]`: start a vLLM server with SafeGene.

The launcher package checks the options and starts vLLM. Unknown flags are passed on to vLLM.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import results
from safegene_vllm.errors import ConfigError

CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


class ApplyMode(StrEnum):
    """Application mode of the vector."""

    gain = "gain"
    composed = "composed"
    weights = "weights"


class MissingProfile(StrEnum):
    """Handling of a tenant without a profile."""

    refuse = "refuse"
    serve_unprotected = "serve_unprotected"


def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="The base model or checkpoint; comes first. Without it, model and vLLM flags are "
            "those of the `serve:` part of --server-config.",
            show_default=False,
        ),
    ] = None,
    family: Annotated[
        Path | None, typer.Option(help="Directory of the safety vector.", show_default=False)
    ] = None,
    apply: Annotated[
        ApplyMode | None,
        typer.Option(help="Application mode of the vector.", show_default="gain"),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A tenant served from the start: a PEFT adapter with a profile, or a profile "
            "alone. May be repeated.",
        ),
    ] = None,
    base_profile: Annotated[
        Path | None,
        typer.Option(help="Profile of requests without an adapter (gain only).", show_default="0"),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Profile of the checkpoint (weights only).", show_default="MODEL's own"),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(help="Load adapters only from below this directory. May be repeated."),
    ] = None,
    missing_profile: Annotated[
        MissingProfile | None,
        typer.Option(help="Handling of a tenant without a profile.", show_default="refuse"),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="LoRA slots on the device (vLLM's --max-loras).",
            show_default="one per tenant, at least 4",
        ),
    ] = None,
    server_config: Annotated[
        Path | None,
        typer.Option(
            help="Serve the tenants of a registry: file with its URL, store and access, e.g. "
            "safegene.yaml. With a `serve:` part in it, MODEL is left out."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print command and environment; start nothing.")
    ] = False,
) -> None:
    """Serve a model and its tenants with vLLM, each tenant protected and verified.

    Every flag of vLLM may follow, such as --port 8080 or --tensor-parallel-size 2. All files are
    checked before vLLM starts; "ready" is printed only after every worker's receipt is verified.
    """
    from safegene_vllm.launcher import ServeOptions, build_command, launch, read_config_file

    vllm_args = tuple(context.args)
    if model is not None and model.startswith("-"):
        # Without MODEL, click takes the first vLLM flag for it.
        vllm_args = (model, *vllm_args)
        model = None
    if model is None and server_config is None:
        found = repr(vllm_args[0]) if vllm_args else "nothing"
        raise ConfigError(f"MODEL comes first: safegene serve MODEL [options]; found {found}.")
    if model is None and server_config is not None:
        config = read_config_file(server_config)
        model, vllm_args = config.model, (*config.flags(), *vllm_args)
        family, slots = family or config.family, slots or config.slots
        base_profile = base_profile or config.base_profile
        if apply is None and config.apply is not None:
            apply = ApplyMode(config.apply)
    assert model is not None
    command = build_command(
        ServeOptions(
            model=model,
            family=family,
            apply=None if apply is None else apply.value,
            tenants=_tenants(tenant or []),
            base_profile=base_profile,
            profile=profile,
            adapter_roots=adapter_root or (),
            missing_profile=None if missing_profile is None else missing_profile.value,
            slots=slots,
            server_config=server_config,
            vllm_args=vllm_args,
        ),
        os.environ,
    )
    if dry_run:
        results().print(command.shown())
        return
    raise typer.Exit(launch(command, results()))


def _tenants(entries: list[str]) -> dict[str, Path]:
    """Parse NAME=DIR entries. Errors: ConfigError, also for a name given twice."""
    tenants: dict[str, Path] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise ConfigError(f"--tenant {entry!r}: expected NAME=DIR.")
        if name in tenants:
            raise ConfigError(f"--tenant {name}: given twice; every tenant needs its own name.")
        tenants[name] = Path(path)
    return tenants
