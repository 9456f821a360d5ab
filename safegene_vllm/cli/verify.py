"""The command `safegene verify`: options in, table and exit code out. The work is offline/verify."""

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
        typer.Option(help="Checkpoint to verify with. Default: a pico model made on the spot."),
    ] = None,
    family: Annotated[Path | None, typer.Option(help="Its family (with --model).")] = None,
    tenant: Annotated[
        list[Path] | None,
        typer.Option(help="A tenant's directory with a profile; give two or more (with --model)."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 asks for equal tokens; bfloat16 and float16 for closeness.")
    ] = "",
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Ranks to shard every engine over.")
    ] = 1,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also exercise torch.compile (slower start).")
    ] = False,
) -> None:
    """Check on this machine that protection is exact and touches nobody else.

    Starts four small engines in turn and compares them: the three ways of application agree; a row
    of zeros is bit-identical to an engine without a vector; one tenant's profile changes no bit of
    another's answer; every rank applied every site. Exit code 0 if all hold, 1 if not.

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

            house = write_setup(root / "pico")
            model, family, tenants = house.model, house.family, list(house.tenants)
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
    table = Table("", "what must hold", "measured", title=f"safegene verify ({dtype})")
    for check in checks:
        mark = "[green]holds[/]" if check.passed else "[bold red]BROKEN[/]"
        table.add_row(mark, check.what, check.measured)
    console.print(table)
    raise typer.Exit(0 if all(check.passed for check in checks) else 1)
