"""`safegene profile`: write a tenant's coefficients by hand."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import coefficient_table, results
from safegene_vllm.cli.extract import parse_layers
from safegene_vllm.errors import ConfigError


def parse_coefficients(
    text: str, option: str = "--coefficients", carried: Collection[int] | None = None
) -> dict[int, float]:
    """Parse `0:0.5,3-5:1.0` into coefficients by layer.

    A range covers the layers of `carried`, those with a vector, in it (None: every layer).
    Errors: ConfigError, also for a range without any of them.
    """
    found: dict[int, float] = {}
    for part in text.split(","):
        layers, colon, value = part.partition(":")
        try:
            number = float(value)
        except ValueError:
            colon = ""
        if not colon:
            raise ConfigError(
                f"{option}: {part!r} is not LAYER:NUMBER; write for example 0:0.5,3-5:1.0"
            )
        named = parse_layers(layers, option)
        if has_range(layers) and carried is not None:
            named = tuple(layer for layer in named if layer in carried)
            if not named:
                raise ConfigError(
                    f"{option}: no layer in {layers} has a vector; expected some of "
                    f"{', '.join(map(str, sorted(carried)))}"
                )
        for layer in named:
            if layer in found:
                raise ConfigError(f"{option}: layer {layer} is given twice")
            found[layer] = number
    return found


def has_range(text: str) -> bool:
    """Return whether coefficients are given for a range of layers, such as `3-5:1.0`."""
    return any("-" in part.partition(":")[0] for part in text.split(","))


def profile(
    family: Annotated[
        Path, typer.Argument(help="The family's directory, e.g. families/qwen2.5-7b.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The tenant's directory: a LoRA adapter, a checkpoint, or a new one for a profile "
            "on the base model, e.g. --out tenants/acme. Its other files are unchanged."
        ),
    ],
    coefficient: Annotated[
        float | None,
        typer.Option(
            help="One number for every layer with a vector, e.g. --coefficient 0.6. 0 is no "
            "effect, 1 the vector as extracted."
        ),
    ] = None,
    coefficients: Annotated[
        str | None,
        typer.Option(
            metavar="L:X,...",
            help="Single layers, or the layers with a vector in a range, e.g. --coefficients "
            "0:0.5,3-5:1.0. Other layers have --coefficient, else the coefficient of the tenant's "
            "profile, else 0.",
        ),
    ] = None,
) -> None:
    """Write or change a tenant's profile by hand.

    Example: safegene profile families/qwen2.5-7b --coefficient 0.6 --out tenants/acme
    """
    from safegene_vllm.formats.family import read_family_header
    from safegene_vllm.formats.metadata import DESCRIPTION_FILE
    from safegene_vllm.formats.profile import (
        check_profile,
        has_profile,
        load_profile,
        make_profile,
        save_profile,
    )
    from safegene_vllm.formats.tenant_directory import check_fits, reject_exported

    if coefficient is None and coefficients is None:
        raise ConfigError("give --coefficient 0.6 or --coefficients 0:0.5,3:1.0, or both")
    header = read_family_header(family)
    reject_exported(out)
    if os.path.lexists(out):
        check_fits(out, header, new_profile=True)
    selected = {entry.layer for entry in header.layers}
    if coefficient is not None:
        values = dict.fromkeys(selected, coefficient)
    elif has_profile(out):
        old = load_profile(out)
        check_profile(old, header)
        values = dict(enumerate(old.coefficients))
    else:
        values = {}
    changed = parse_coefficients(coefficients, carried=selected) if coefficients else {}
    made = make_profile(header, {**values, **changed}, {"method": "by hand"})
    save_profile(made, out)
    console = results()
    console.print(f"{out / DESCRIPTION_FILE}  {made.digest}")
    console.print(coefficient_table(made.coefficients))
