"""`safegene inspect`: show the kind and content of a directory, read-only.

Families, profiles, adapters and checkpoints are read by the library's loaders, so an invalid file
raises the error that serving it would raise.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from safegene_vllm.cli.console import bar, clean, coefficient_table, results, table
from safegene_vllm.prompt_sketch import without_sketches

if TYPE_CHECKING:
    from safegene_vllm.formats.adapter import LoRAWeights
    from safegene_vllm.formats.family import FamilyHeader

Facts = dict[str, Any]


def _sites(lora_weights: Mapping[str, LoRAWeights]) -> list[Facts]:
    from safegene_vllm.formats.adapter import layer_of
    from safegene_vllm.formats.safetensors_file import dtype_name
    from safegene_vllm.recipe.difference import lora_norm

    return [
        {
            "site": site,
            "layer": layer_of(site),
            "rank": lora.rank,
            "shape": [lora.d_out, lora.d_in],
            "dtype": dtype_name(lora.a),
            "norm": lora_norm(lora),
        }
        for site, lora in lora_weights.items()
    ]


def _layers(sites: Iterable[Facts], scores: Mapping[int, float | None]) -> list[Facts]:
    """Per layer: number of target modules, ranks, and their joint norm."""
    by_layer: dict[int, list[Facts]] = {}
    for site in sites:
        if site["layer"] is not None:
            by_layer.setdefault(site["layer"], []).append(site)
    return [
        {
            "layer": layer,
            "score": scores.get(layer),
            "sites": len(own),
            "ranks": sorted({site["rank"] for site in own}),
            "norm": math.hypot(*(site["norm"] for site in own)),
        }
        for layer, own in sorted(by_layer.items())
    ]


def _family(directory: Path) -> Facts:
    from safegene_vllm.formats.family import load_family

    family = load_family(directory)
    header = family.header
    sites = _sites(family.lora_weights)
    return {
        "name": header.name,
        "digest": header.digest,
        "base": {
            "architecture": header.base.architecture,
            "num_layers": header.base.num_layers,
            "fingerprint": header.base.fingerprint,
        },
        "bounds": list(header.bounds),
        "layers": _layers(sites, {entry.layer: entry.score for entry in header.layers}),
        "sites": sites,
        "recipe": dict(header.recipe),
    }


def _adapter(directory: Path) -> Facts:
    from safegene_vllm.formats.adapter import load_adapter

    adapter = load_adapter(directory)
    sites = _sites(dict(sorted(adapter.lora_weights.items())))
    return {"base_model": adapter.base_model, "layers": _layers(sites, {}), "sites": sites}


def _checkpoint(directory: Path) -> Facts:
    from safegene_vllm.formats.checkpoint import read_checkpoint
    from safegene_vllm.formats.family import base_of_checkpoint

    base, checkpoint = base_of_checkpoint(directory), read_checkpoint(directory)
    infos = checkpoint.infos.values()
    return {
        "base": {
            "architecture": base.architecture,
            "num_layers": base.num_layers,
            "fingerprint": base.fingerprint,
        },
        "tensors": len(infos),
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.end - info.begin for info in infos),
        "dtypes": dict(Counter(info.dtype for info in infos)),
        "shards": list(checkpoint.shards),
    }


def _profile(directory: Path, header: FamilyHeader | None) -> Facts:
    from safegene_vllm.formats.profile import check_profile, load_profile

    profile = load_profile(directory)
    if header is not None:
        check_profile(profile, header)
    return {
        "digest": profile.digest,
        "family": profile.family,
        "family_name": None if header is None else header.name,
        "coefficients": list(profile.coefficients),
        "calibration": dict(profile.calibration),
    }


def describe(directory: Path, family: Path | None = None) -> Facts:
    """Describe a directory as JSON values, with all its tensor values and digests checked.

    With `family`, the tenant is checked against it too. Errors: those of the loaders, of `kind_of`,
    `check_fits` and `check_profile`.
    """
    from safegene_vllm.formats.family import read_family_header
    from safegene_vllm.formats.file_io import read_json
    from safegene_vllm.formats.profile import has_profile
    from safegene_vllm.formats.tenant_directory import RECORD_FILE, check_fits, kind_of

    kind = kind_of(directory)
    facts: Facts = {"path": str(directory), "kind": kind}
    if kind == "family":
        return facts | _family(directory)
    header = None if family is None else read_family_header(family)
    if header is not None:
        check_fits(directory, header)
    if kind == "adapter":
        facts |= _adapter(directory)
    elif kind == "checkpoint":
        facts |= _checkpoint(directory)
    facts["profile"] = _profile(directory, header) if has_profile(directory) else None
    record = directory / RECORD_FILE
    facts["exported"] = read_json(record) if record.exists() else None
    return facts


def _counts(values: Iterable[Any]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))


def _show_sites(console: Console, facts: Facts) -> None:
    sites, layers = facts["sites"], facts["layers"]
    console.print(f"targets   {len(sites)} modules in {len(layers)} layers")
    console.print(f"modules   {_counts(site['site'].rpartition('.')[2] for site in sites)}")
    console.print(f"ranks     {_counts(site['rank'] for site in sites)}")
    console.print(f"dtypes    {_counts(site['dtype'] for site in sites)}")
    top = max((layer["norm"] for layer in layers), default=0.0)
    rows = table("layer", "modules", "score", "‖B·A‖", "", left=("",))
    for layer in layers:
        score = "-" if layer["score"] is None else f"{layer['score']:.4g}"
        rows.add_row(
            str(layer["layer"]),
            str(layer["sites"]),
            score,
            f"{layer['norm']:.4g}",
            bar(layer["norm"], top),
        )
    console.print(rows)
    for site in sites:
        if site["layer"] is None:
            console.print(f"outside the layers: {site['site']}, ‖B·A‖ {site['norm']:.4g}")


def _number(values: Any, key: str) -> str:
    value = values.get(key) if isinstance(values, dict) else None
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _show_calibration(console: Console, record: Facts) -> None:
    """Print a calibration record: a row per kind of example, then its other fields.

    A record is free-form; what is not in a known form is printed as JSON.
    """
    kinds = [record.get(key) for key in ("data", "shots", "before", "after")]
    data, shots, before, after = (value if isinstance(value, dict) else {} for value in kinds)
    rows = table(*("examples", "n", "held out: before", "after", "data"), left=("examples", "data"))
    for kind in dict.fromkeys((*shots, *data, *before, *after)):
        origin, count = data.get(kind), shots.get(kind)
        shown = origin if isinstance(origin, dict) else {}
        count = count.get("rows") if isinstance(count, dict) else count
        licence = f" ({shown['licence']})" if shown.get("licence") else ""
        rows.add_row(
            clean(str(kind)),
            "-" if count is None else str(count),
            _number(before, kind),
            _number(after, kind),
            clean(f"{shown.get('name') or '-'}{licence}"),
        )
    facts = {
        key: value
        for key, value in record.items()
        if key not in ("data", "shots", "before", "after", "losses", "held_out")
        or (key in ("losses", "held_out") and not isinstance(value, list))
    }
    console.print("calibration")
    if rows.row_count:
        console.print(rows)
    for key, value in facts.items():
        shown_value = value if isinstance(value, str) else json.dumps(value)
        console.print(clean(f"  {key}: {shown_value}"))


def _show_profile(console: Console, profile: Facts | None) -> None:
    if profile is None:
        console.print("profile   none, so as a tenant it would be rejected or served unprotected")
        return
    console.print(f"profile   {profile['digest']}")
    checked = f" ({profile['family_name']}, fits)" if profile["family_name"] else ""
    console.print(f"family    {profile['family']}{checked}")
    if not checked:
        console.print("fits      not checked; name the family: --family DIR")
    if profile["calibration"]:
        _show_calibration(console, without_sketches(profile["calibration"]))
    if any(profile["coefficients"]):
        console.print(coefficient_table(profile["coefficients"]))
    else:
        console.print("coefficients: all 0, no effect")


def _title(facts: Facts) -> str:
    if facts["kind"] == "family":
        return f"family {facts['name']!r}"
    suffix = " with a profile" if facts["profile"] else ""
    return {
        "adapter": f"PEFT LoRA adapter{suffix}",
        "checkpoint": f"Hugging Face checkpoint{suffix}",
        "profile": "profile, a tenant on the base model",
    }[facts["kind"]]


def show(console: Console, facts: Facts) -> None:
    """Print `facts` as text and tables."""
    console.print(f"{facts['path']}: {_title(facts)}")
    if "digest" in facts:
        console.print(f"digest    {facts['digest']}")
    if base := facts.get("base"):
        console.print(
            f"base      {base['architecture']}, {base['num_layers']} layers, {base['fingerprint']}"
        )
    if facts.get("base_model"):
        console.print(f"base      {facts['base_model']}")
    if "bounds" in facts:
        console.print("bounds    {} to {}".format(*facts["bounds"]))
    if "tensors" in facts:
        size = f"{facts['parameters']:,} parameters, {facts['bytes'] / 1e9:.2f} GB"
        dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in facts["dtypes"].items())
        console.print(f"weights   {size}, {dtypes}, {len(facts['shards'])} file(s)")
    if "sites" in facts:
        _show_sites(console, facts)
    if facts.get("exported"):
        family = json.dumps(facts["exported"].get("family"))
        console.print(f"exported  the vector of {family} is in these weights; add no profile")
    elif "profile" in facts:
        _show_profile(console, facts["profile"])
    if "recipe" in facts:
        console.print("recipe    " + json.dumps(without_sketches(facts["recipe"]), indent=2))


def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            help="A family, a profile, a LoRA adapter or a checkpoint, e.g. tenants/acme."
        ),
    ],
    family: Annotated[
        Path | None,
        typer.Option(
            help="Also check that the tenant fits this family, e.g. --family families/qwen."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object, e.g. for jq: safegene inspect DIR --json."),
    ] = False,
) -> None:
    """Show what a directory holds: target modules, ranks, layers, norms, coefficients, digests.

    Every value is checked; exit code 1 and the error's name if the directory is invalid.

    Example: safegene inspect tenants/acme --family families/qwen
    """
    facts = describe(directory, family)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(results(), facts)
