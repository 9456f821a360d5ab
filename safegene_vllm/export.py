"""Export of a tenant with its vector to ordinary files, for engines without the plugin.

Either one PEFT adapter (tenant and vector as one LoRA per target module) or a full checkpoint with
both merged, written shard by shard with about one tensor in memory. Neither carries a profile:
`safegene-export.json` records what was merged. torch is imported inside the functions.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safegene_vllm import __version__
from safegene_vllm.errors import (
    AdapterRejectedError,
    FamilyMismatchError,
    FormatError,
    SafegeneError,
    ShapeError,
    SiteError,
    TruncatedFileError,
    raise_errors,
)
from safegene_vllm.formats.adapter import (
    CONFIG_FILE,
    OWNED_FILES,
    WEIGHTS_FILE,
    Adapter,
    LoRAWeights,
    adapter_files,
    fold_scaling,
    layer_of,
    load_adapter,
)
from safegene_vllm.formats.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_checkpoint
from safegene_vllm.formats.file_io import pretty_json, replace_directory, size_of_regular_file
from safegene_vllm.formats.profile import Profile, check_profile
from safegene_vllm.formats.safetensors_file import FLOAT_BITS, tensor_bytes
from safegene_vllm.formats.tenant_directory import RECORD_FILE, check_fits, kind_of, reject_exported

if TYPE_CHECKING:
    import torch

    from safegene_vllm.formats.family import Family

Progress = Callable[[int, int], None]
"""Callback with the bytes written and the total."""

_BLOCK_BYTES = 16 << 20
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE")


@dataclass(frozen=True)
class Exported:
    """Result of an export: target modules, those changed, the largest rank (0: a checkpoint)."""

    path: Path
    sites: int
    changed: int
    max_rank: int


def _record(form: str, family: Family, profile: Profile, more: Mapping[str, Any]) -> bytes:
    return pretty_json(
        {
            "kind": "export",
            "format_version": 1,
            "form": form,
            "note": "The safety vector is in these weights already. Add no profile to them.",
            "family": {"name": family.header.name, "digest": family.digest},
            "profile": profile.digest,
            "coefficients": list(profile.coefficients),
            **more,
            "made_by": f"safegene-vllm {__version__}",
        }
    )


def _own_adapter(tenant: Path | None, family: Family) -> Adapter | None:
    """The tenant's LoRA, None for a bare profile. Errors: AdapterRejectedError and the like."""
    if tenant is None:
        return None
    reject_exported(tenant)
    kind = kind_of(tenant)
    if kind == "checkpoint":
        raise AdapterRejectedError(
            f"{tenant} is a full checkpoint; expected a LoRA adapter or a profile alone: export it "
            f"by --checkpoint {tenant}, without a tenant"
        )
    check_fits(tenant, family.header)
    return load_adapter(tenant) if kind == "adapter" else None


def _padded(lora: LoRAWeights, rank: int) -> LoRAWeights:
    """The same ΔW at `rank`: rows of a and columns of b padded with zeros."""
    from torch.nn.functional import pad

    missing = rank - lora.rank
    return LoRAWeights(pad(lora.a, (0, 0, 0, missing)), pad(lora.b, (0, missing)), lora.scaling)


def export_adapter(
    tenant: Path | None,
    family: Family,
    profile: Profile,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
) -> Exported:
    """Write tenant and vector as one PEFT adapter of a single rank, scaling 1, float32.

    `tenant` is an adapter's directory; None or a bare profile's for the vector alone. One rank for
    all, padded with zeros, because many engines read `r` and no `rank_pattern`. LoRA weights of
    zero are left out. Errors: those of composition.compose_adapter; FormatError if `out` holds more
    than an earlier export; AdapterRejectedError if the tenant was exported already.
    """
    from safegene_vllm.composition import compose_adapter

    composed = compose_adapter(_own_adapter(tenant, family), family, profile)
    # If all are zero they stay: no engine loads an adapter without tensors.
    used = {
        site: p for site, p in composed.lora_weights.items() if bool(p.b.any())
    } or composed.lora_weights
    rank = max(lora.rank for lora in used.values())
    lora_weights = {site: fold_scaling(_padded(lora, rank), dtype) for site, lora in used.items()}
    files = adapter_files(lora_weights, composed.base_model)
    files[RECORD_FILE] = _record(
        "adapter", family, profile, {"sites": len(lora_weights), "max_rank": rank}
    )
    replace_directory(Path(out), files, owned=(CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE))
    return Exported(Path(out), len(lora_weights), len(lora_weights), rank)


def _composed_lora_weights(
    own: Adapter | None, family: Family, profile: Profile
) -> dict[str, LoRAWeights]:
    """LoRA weights to merge, by target module; those of zero are left out.

    Semantics: scaling · b @ a = s_t b_t @ a_t + λ b_s @ a_s, one rounding for both.
    """
    from safegene_vllm.composition import composed_lora

    tenant = {} if own is None else own.lora_weights
    lora_weights: dict[str, LoRAWeights] = {}
    for site in sorted(tenant.keys() | family.lora_weights.keys()):
        theirs, safety = tenant.get(site), family.lora_weights.get(site)
        if safety is None:
            assert theirs is not None
            lora_weights[site] = theirs
            continue
        layer = layer_of(site)
        assert layer is not None
        coefficient = profile.coefficients[layer]
        if coefficient == 0.0 and theirs is not None:
            lora_weights[site] = theirs
        elif coefficient != 0.0 and theirs is not None:
            lora_weights[site] = composed_lora(theirs, safety, coefficient)
        elif coefficient != 0.0:
            # Not folded into b, so that the weight is bit-identical to --load-format safegene.
            lora_weights[site] = replace(safety, scaling=coefficient * safety.scaling)
    return {site: lora for site, lora in lora_weights.items() if bool(lora.b.any())}


def _check_weights(checkpoint: Checkpoint, lora_weights: Mapping[str, LoRAWeights]) -> None:
    """Check that every weight to merge into exists, fits, is of a float dtype and not tied."""
    where = checkpoint.directory
    text = checkpoint.config.get("text_config")
    tied = checkpoint.config.get("tie_word_embeddings") or (
        isinstance(text, dict) and text.get("tie_word_embeddings")
    )
    errors: list[SafegeneError] = []
    for site, lora in lora_weights.items():
        info = checkpoint.infos.get(checkpoint.weight_name(site))
        if tied and layer_of(site) is None:
            errors.append(
                SiteError(
                    f"{where} ties its word embeddings, and the adapter has LoRA weights for "
                    f"{site}: merging them would change both; export an adapter instead"
                )
            )
        elif info is None:
            errors.append(SiteError(f"{where} has no weight for the target module {site}"))
        elif info.shape != (lora.d_out, lora.d_in):
            errors.append(
                FamilyMismatchError(
                    f"{site}: the LoRA is for {(lora.d_out, lora.d_in)}, the weight in {where} is "
                    f"{info.shape}"
                )
            )
        elif info.dtype not in FLOAT_BITS:
            errors.append(
                ShapeError(
                    f"{site} is stored as {info.dtype} in {where}: a LoRA cannot be merged "
                    "into quantized weights; export an adapter, or merge into the "
                    "original checkpoint"
                )
            )
    raise_errors(errors)


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int, path: Path) -> None:
    while count:
        block = source.read(min(count, _BLOCK_BYTES))
        if not block:
            raise TruncatedFileError(f"{path} became shorter while it was read; download it again")
        target.write(block)
        count -= len(block)


def _write_shard(
    checkpoint: Checkpoint,
    shard: str,
    by_name: Mapping[str, LoRAWeights],
    target: Path,
    done: Callable[[int], None],
) -> None:
    """Copy a shard, header byte for byte, with the LoRA weights in `by_name` merged."""
    from safegene_vllm.composition import merge_into

    path = checkpoint.directory / shard
    with open(path, "rb") as source, open(target, "wb") as file:
        prefix = source.read(8)
        file.write(prefix)
        _copy_bytes(source, file, int.from_bytes(prefix, "little"), path)
        for name, info in checkpoint.shards[shard].items():
            length = info.end - info.begin
            lora = by_name.get(name)
            if lora is None:
                _copy_bytes(source, file, length, path)
            else:
                file.write(tensor_bytes(merge_into(checkpoint.read(name), lora, 1.0)))
                source.seek(length, os.SEEK_CUR)
            done(length)


def _companions(checkpoint: Checkpoint) -> list[Path]:
    """Config, tokenizer, chat templates and license of a checkpoint."""
    skipped = {*OWNED_FILES, RECORD_FILE}
    found = [
        path
        for path in sorted(checkpoint.directory.iterdir())
        if path.name not in skipped
        and not path.is_dir()
        and not path.name.endswith(".index.json")
        and (path.suffix in _COPIED_SUFFIXES or path.name.startswith(_COPIED_NAMES))
    ]
    # An index next to a single file is stale, and some readers would follow it.
    if SINGLE_FILE not in checkpoint.shards:
        found.append(checkpoint.directory / INDEX_FILE)
    return found + sorted(checkpoint.directory.glob("additional_chat_templates/*.jinja"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory to fill, renamed to `path` at the end or removed on an error.

    For exports too large for file_io.replace_directory. With `overwrite` an earlier export at
    `path` is replaced; anything else there is rejected (FormatError).
    """
    path = Path(os.path.realpath(path))
    exists = os.path.lexists(path)
    if exists and not (overwrite and (path / RECORD_FILE).is_file()):
        raise FormatError(
            f"{path} exists{' and is not an earlier export' if overwrite else ''}; "
            f"name a new directory{'' if overwrite else ', or replace an export by --overwrite'}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    temporary, old = (path.with_name(f".{path.name}.{what}-{token}") for what in ("new", "old"))
    try:
        temporary.mkdir()
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        if exists:
            os.rename(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if exists:
                os.rename(old, path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def export_checkpoint(
    base: Path,
    tenant: Path | None,
    family: Family,
    profile: Profile,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write `base` with W' = W + s_t B_t A_t + λ B A merged: same shards, names and dtypes.

    `tenant` is an adapter's directory; None if the checkpoint itself is the tenant. Other tensors
    are copied byte for byte, aliases (tied embeddings) stay aliases.
    Errors: those of composition; SiteError (weight missing or tied), ShapeError (quantized),
    NonFiniteError (overflow), FamilyMismatchError, FormatError if `out` exists,
    AdapterRejectedError if an input was exported.
    """
    base, out = Path(base), Path(out)
    check_profile(profile, family.header)
    reject_exported(base)
    if (kind := kind_of(base)) != "checkpoint":
        raise FormatError(f"{base} holds: {kind}; expected a Hugging Face checkpoint")
    check_fits(base, family.header)
    checkpoint = read_checkpoint(base)
    lora_weights = _composed_lora_weights(_own_adapter(tenant, family), family, profile)
    _check_weights(checkpoint, lora_weights)
    by_name = {checkpoint.weight_name(site): lora for site, lora in lora_weights.items()}
    total = sum(info.end - info.begin for info in checkpoint.infos.values())
    written = 0

    def done(count: int) -> None:
        nonlocal written
        written += count
        if progress is not None:
            progress(written, total)

    with _new_directory(out, overwrite=overwrite) as temporary:
        for path in _companions(checkpoint):
            size_of_regular_file(path)
            target = temporary / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        for shard in checkpoint.shards:
            _write_shard(checkpoint, shard, by_name, temporary / shard, done)
        more = {"sites": len(family.lora_weights), "merged_weights": sorted(by_name)}
        (temporary / RECORD_FILE).write_bytes(_record("checkpoint", family, profile, more))
    return Exported(out, len(family.lora_weights), len(by_name), 0)
