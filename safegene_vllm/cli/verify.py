"""`safegene verify`: check on this machine that the vector is applied exactly."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from safegene_vllm.errors import ConfigError


def verify(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to verify with. Default: a generated tiny model."),
    ] = None,
    family: Annotated[Path | None, typer.Option(help="Its family (with --model).")] = None,
    tenant: Annotated[
        list[Path] | None,
        typer.Option(help="A tenant's directory with a profile; two or more (with --model)."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 requires equal tokens; bfloat16 and float16, close ones.")
    ] = "",
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Ranks to shard every engine over.")
    ] = 1,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also exercise torch.compile (slower start).")
    ] = False,
) -> None:
    """Verify on this machine that the vector is applied exactly, and to its tenant alone.

    Starts four small engines in turn and compares them: the three application modes agree; a row
    of zeros is bit-identical to an engine without a vector; one tenant's profile changes no bit of
    another's completion; every rank applied every target module. Exit code 1 if any check fails.

    Example: safegene verify --model ./llama --family ./family --tenant ./acme --tenant ./globex
    """
    import torch

    from safegene_vllm.offline.verify import verify as run

    console = Console()
    dtype = dtype or ("bfloat16" if torch.accelerator.is_available() else "float32")
    with tempfile.TemporaryDirectory(prefix="safegene-verify-") as work:
        root = Path(work)
        if model is None:
            from safegene_vllm.tiny_model import write_setup

            setup = write_setup(root / "tiny")
            model, family, tenants = setup.model, setup.family, list(setup.tenants)
        else:
            tenants = list(tenant or ())
        if family is None:
            raise ConfigError("--model is given without --family; give the family of that model.")
        (root / "work").mkdir()
        with console.status("starting engines ...") as status:
            checks = run(
                model,
                family,
                tenants,
                work=root / "work",
                dtype=dtype,
                progress=lambda message: status.update(f"engine: {message} ..."),
                enforce_eager=not compiled,
                tensor_parallel_size=tensor_parallel_size,
            )
    table = Table("", "check", "measured", title=f"safegene verify ({dtype})")
    for check in checks:
        mark = "[green]passed[/]" if check.passed else "[bold red]FAILED[/]"
        table.add_row(mark, check.what, check.measured)
    console.print(table)
    raise typer.Exit(0 if all(check.passed for check in checks) else 1)
