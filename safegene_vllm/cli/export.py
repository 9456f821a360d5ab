"""`safegene export`: write a protected tenant as standard files for engines without the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import check_out, progress_bar, results
from safegene_vllm.cli.extract import Dtype
from safegene_vllm.cli.options import local_checkpoint
from safegene_vllm.errors import ConfigError


def export(
    family: Annotated[
        Path, typer.Option(help="The profile's family, e.g. --family families/qwen.")
    ],
    out: Annotated[Path, typer.Option(help="Output directory, e.g. --out exported/acme.")],
    tenant: Annotated[
        Path | None,
        typer.Argument(
            help="The tenant's directory, e.g. tenants/acme: a LoRA adapter with its profile, or a "
            "profile alone."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            parser=local_checkpoint,
            help="Write this full checkpoint with vector and tenant merged in, e.g. "
            "--checkpoint models/qwen-instruct. Without TENANT, the checkpoint is the tenant.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Another way to name TENANT, for use with --checkpoint, e.g. --adapter "
            "tenants/acme."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Another profile (a directory or a safegene.json) instead of the tenant's own, "
            "e.g. --profile profiles/strict."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Stored dtype of an adapter, e.g. --dtype bfloat16 (default: float32). A "
            "checkpoint keeps its own dtypes."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing export at OUT.")
    ] = False,
) -> None:
    """Write a tenant with its safety vector as a plain PEFT adapter or a merged checkpoint.

    Examples: safegene export tenants/acme --family families/qwen --out exported/acme

    safegene export --checkpoint models/qwen --adapter tenants/acme --family families/qwen
    --out exported/acme-merged
    """
    if tenant is not None and adapter is not None:
        raise ConfigError("TENANT and --adapter both name the tenant; give one of them")
    tenant = tenant or adapter
    source = profile or tenant or checkpoint
    if source is None:
        raise ConfigError("give TENANT, --checkpoint, or --profile alone to export the vector")
    if dtype is not None and checkpoint is not None:
        raise ConfigError("--dtype: a checkpoint keeps its own dtypes; leave the option out")
    check_out(out, tenant, checkpoint, profile, family, overwrite=overwrite)
    import torch

    from safegene_vllm.export import export_adapter, export_checkpoint
    from safegene_vllm.formats.family import load_family
    from safegene_vllm.formats.profile import load_profile
    from safegene_vllm.formats.tenant_directory import kind_of
    from safegene_vllm.planner.slots import rank_bucket

    loaded, coefficients = load_family(family), load_profile(source)
    if checkpoint is not None:
        with progress_bar() as progress:
            task = progress.add_task("merging", total=None)
            done = export_checkpoint(
                checkpoint,
                tenant,
                loaded,
                coefficients,
                out,
                overwrite=overwrite,
                progress=lambda now, total: progress.update(task, completed=now, total=total),
            )
        results().print(f"{done.path}: {done.changed} weights merged; serve it as a standard model")
        return
    if tenant is not None and kind_of(tenant) == "checkpoint":
        raise ConfigError(f"{tenant} is a checkpoint; export it with --checkpoint {tenant}")
    stored = None if dtype is None else getattr(torch, dtype.value)
    done = export_adapter(tenant, loaded, coefficients, out, dtype=stored)
    try:
        need = f"vLLM needs --max-lora-rank {rank_bucket(done.max_rank)} or more"
    except ConfigError:
        need = "that exceeds vLLM's largest --max-lora-rank; merge it into a checkpoint instead"
    results().print(f"{done.path}: {done.sites} target modules, rank {done.max_rank}; {need}")
