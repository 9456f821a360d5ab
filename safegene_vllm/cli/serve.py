"""`safegene serve MODEL [options] [any vLLM flag]`: start a vLLM server with SafeGene.

The launcher package checks the options and starts vLLM. Unknown flags are passed on to vLLM.
"""

from __future__ import annotations

import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegene_vllm.cli.console import notes, results
from safegene_vllm.errors import ConfigError

if TYPE_CHECKING:
    from safegene_vllm.launcher import Launch, ServeOptions

CONTEXT_SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}


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
            help="The base model or checkpoint, a directory or a hub name, e.g. models/aligned; "
            "comes first. Without it, model and vLLM flags are those of the `serve:` part of "
            "--server-config.",
            show_default=False,
        ),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the safety vector, e.g. families/mine.", show_default=False
        ),
    ] = None,
    apply: Annotated[
        ApplyMode | None,
        typer.Option(help="Application mode of the vector, e.g. composed.", show_default="gain"),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A tenant served from the start: a PEFT adapter with a profile, or a profile "
            "alone, e.g. acme=tenants/acme. May be repeated.",
        ),
    ] = None,
    base_profile: Annotated[
        Path | None,
        typer.Option(
            help="Profile of requests without an adapter (gain only), e.g. profiles/base.",
            show_default="0",
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Profile of the checkpoint (weights only), e.g. profiles/acme.",
            show_default="MODEL's own",
        ),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Load adapters only from below this directory, e.g. /srv/adapters. "
            "May be repeated."
        ),
    ] = None,
    missing_profile: Annotated[
        MissingProfile | None,
        typer.Option(
            help="Handling of a tenant without a profile, e.g. serve_unprotected.",
            show_default="refuse",
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            help="LoRA slots on the device (vLLM's --max-loras), e.g. 8.",
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
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print command and environment; start nothing."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show vLLM's whole log during the start, not its stages."),
    ] = False,
) -> None:
    """Serve a model and its tenants with vLLM, each tenant protected and verified.

    Every flag of vLLM may follow, such as --port 8080 or --tensor-parallel-size 2. Everything is
    checked before vLLM starts; "ready" is printed only after every worker's receipt is verified.

    Example: safegene serve models/aligned --family families/mine --tenant acme=tenants/acme
    """
    from safegene_vllm.doctor import check_installation, problems
    from safegene_vllm.launcher import ServeOptions, check_address, launch

    if model is not None and model.startswith("-"):
        # Without MODEL, click takes the first vLLM flag for it.
        context.args.insert(0, model)
        model = None
    if model is None and server_config is None:
        found = repr(context.args[0]) if context.args else "nothing"
        raise ConfigError(f"MODEL comes first: safegene serve MODEL [options]; found {found}.")
    command = build(
        ServeOptions(
            model=model or "",
            family=family,
            apply=None if apply is None else apply.value,
            tenants=_tenants(tenant or []),
            base_profile=base_profile,
            profile=profile,
            adapter_roots=adapter_root or (),
            missing_profile=None if missing_profile is None else missing_profile.value,
            slots=slots,
            server_config=server_config,
            vllm_args=tuple(context.args),
        )
    )
    if dry_run:
        installation = [f"note: {problem}" for problem in problems(os.environ)]
        for note in (*installation, *command.notes, *_address_note(command)):
            notes().print(note)
        results().print(command.shown())
        return
    check_installation(os.environ)
    check_address(command.bind)
    raise typer.Exit(launch(command, results(), verbose=verbose))


def _address_note(command: Launch) -> list[str]:
    """Note of an address in use: no error where nothing is started."""
    from safegene_vllm.launcher import check_address

    try:
        check_address(command.bind)
    except ConfigError as error:
        return [f"note: {error}"]
    return []


def build(options: ServeOptions) -> Launch:
    """Build the command of `options`; without a model, from the `serve:` part of their file."""
    from safegene_vllm.launcher import build_command, read_config_file

    if not options.model:
        assert options.server_config is not None
        config = read_config_file(options.server_config)
        options = replace(
            options,
            model=config.model,
            vllm_args=(*config.flags(), *options.vllm_args),
            family=options.family or config.family,
            slots=options.slots or config.slots,
            base_profile=options.base_profile or config.base_profile,
            apply=options.apply or config.apply,
        )
    return build_command(options, os.environ)


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
