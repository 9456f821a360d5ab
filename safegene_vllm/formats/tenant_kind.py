"""The kind of a tenant's directory: LoRA adapter, full checkpoint, profile alone, or rejected.

The one decision for every entry: worker, launcher, commands, registry, local and remote sources.
Made from names, before anything is copied: a copy of the known files leaves out what decides.
Torch-free. Whether the files are sound, and fit a family, is checked elsewhere.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safegene_vllm.errors import (
    AdapterRejectedError,
    MissingFileError,
    PickleRejectedError,
    SafegeneError,
)
from safegene_vllm.formats.adapter import CONFIG_FILE, WEIGHTS_FILE
from safegene_vllm.formats.directory_tree import Entry, LocalTree, Tree
from safegene_vllm.formats.metadata import DESCRIPTION_FILE

TenantKind = Literal["adapter", "checkpoint", "profile"]
SlotKind = Literal["adapter", "profile"]

MAX_ENTRIES = 4096
"""How many names, at every depth together, are looked at to see that a profile is alone."""
MAX_DEPTH = 16

CHECKPOINT_CONFIG = "config.json"
EXPECTED = f"{CONFIG_FILE} and {WEIGHTS_FILE}, or {DESCRIPTION_FILE} alone (a profile on the base)"

_PICKLES = frozenset(("bin", "pt", "pth", "ckpt", "pkl", "pickle"))
# A part of a name that means weights wherever it stands: uploads in progress, backups and downloads
# append their own (adapter_model.safetensors.6eF3a2b1).
_ANYWHERE = frozenset(
    (
        *("safetensors", "bin", "pth", "ckpt", "pkl", "pickle", "gguf", "ggml", "npz", "onnx"),
        *("msgpack", "h5", "hdf5", "distcp", "safetensor", "nemo", "tflite", "torchscript"),
    )
)
# One that means weights, or an archive that may hold them, at the end of a name only: `pt` is a
# language too.
_AT_THE_END = _ANYWHERE | frozenset(
    (
        *("pt", "npy", "pb", "joblib", "keras", "params", "engine", "trt", "pte", "ptl", "zarr"),
        *("mlmodel", "mlpackage", "mlmodelc", "llamafile", "orbax"),
        *("zip", "tar", "tgz", "tbz2", "txz", "7z", "rar"),
    )
)
_WRAPPERS = frozenset(
    (
        *("gz", "bz2", "xz", "zst", "lz4", "gpg", "enc", "part", "partial", "tmp", "temp"),
        *("incomplete", "crdownload", "download", "bak", "old", "orig", "new"),
    )
)
_CHECKPOINT = re.compile(
    r"(model|pytorch_model|tf_model|flax_model|consolidated)([-._].*)?"
    r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf)|.*\.index\.json|.*\.gguf",
    re.IGNORECASE,
)
_MLX = re.compile(r"(.*_)?adapters\.(safetensors|npz)")
_SHOWN = 5
_OF_ITS_OWN = (
    "serve it as a model of its own with --load-format safegene, or convert it to a LoRA adapter"
)


@dataclass(frozen=True)
class _Decision:
    """`files`: the names that decided it."""

    kind: TenantKind
    files: Sequence[str]


def tenant_kind(where: Path | Tree, *, new_profile: bool = False) -> TenantKind:
    """The kind of a tenant's directory; an adapter or a checkpoint may have a profile in it.

    - adapter: adapter_config.json and adapter_model.safetensors, whatever else is there;
    - checkpoint: config.json or weights of a whole model;
    - profile: safegene.json and nothing weight-like in the directory or anywhere below it. With
      `new_profile`, also before that file is written, for the commands that write it.

    Everything else is rejected. Errors: MissingFileError (no directory, nothing of these, half an
    adapter), PickleRejectedError, AdapterRejectedError (weights of another form or in a
    subdirectory, more than MAX_ENTRIES names, a part that cannot be looked into).
    """
    return _decide(_tree(where, new_profile=new_profile), new_profile=new_profile).kind


def slot_kind(where: Path | Tree) -> SlotKind:
    """The kind of a tenant in a LoRA slot: `tenant_kind`, and a full checkpoint is rejected.

    Errors: those of `tenant_kind`; AdapterRejectedError for a full checkpoint.
    """
    tree = _tree(where)
    found = _decide(tree, slot=True)
    if found.kind == "checkpoint":
        raise AdapterRejectedError(
            f"{tree.shown} is a full checkpoint ({_list(found.files)}), expected a LoRA adapter: "
            f"{EXPECTED}; {_OF_ITS_OWN}."
        )
    return found.kind


def is_weight_like(name: str) -> bool:
    """Whether a file or directory of this name may be, or hold, a part of a model."""
    name = name.lower()
    if name in (CONFIG_FILE, CHECKPOINT_CONFIG) or name.endswith(".index.json"):
        return True
    parts = name.split(".")[1:]
    while len(parts) > 1 and parts[-1] in _WRAPPERS:
        parts.pop()
    return bool(parts) and (parts[-1] in _AT_THE_END or not _ANYWHERE.isdisjoint(parts))


# -- the decision --------------------------------------------------------------------------------


def _decide(tree: Tree, *, new_profile: bool = False, slot: bool = False) -> _Decision:
    """With `slot`, the next step in an error is one for a tenant in a LoRA slot."""
    config, weights = tree.has(CONFIG_FILE), tree.has(WEIGHTS_FILE)
    if config and weights:
        return _Decision("adapter", (CONFIG_FILE, WEIGHTS_FILE))
    top, unseen = _listed(tree, "", MAX_ENTRIES)
    likes = [entry.name for entry in top if _is_like(entry)]
    if config or weights or any(_is_adapter_pickle(name) for name in likes):
        raise _incomplete(tree, CONFIG_FILE if weights else WEIGHTS_FILE, likes)
    whole = [name for name in likes if _CHECKPOINT.fullmatch(name)]
    whole = [CHECKPOINT_CONFIG] * tree.has(CHECKPOINT_CONFIG) + whole
    if whole:
        return _Decision("checkpoint", whole)
    if unseen is None:
        below, unseen = _walk(tree, top)
        likes += below
    described = tree.has(DESCRIPTION_FILE)
    if likes:
        raise _not_alone(tree, likes, described=described, slot=slot)
    if unseen is not None:
        raise unseen
    if described and DESCRIPTION_FILE not in {entry.name for entry in top}:
        raise AdapterRejectedError(
            f"{tree.shown} has a {DESCRIPTION_FILE} that its listing leaves out; expected a "
            "listing of all its files, to see that the profile in it is alone: give a directory "
            "that can be listed, or the profile itself without a source."
        )
    if described or new_profile:
        return _Decision("profile", (DESCRIPTION_FILE,))
    raise MissingFileError(
        f"{tree.shown} has none of {CONFIG_FILE}, {DESCRIPTION_FILE}, {WEIGHTS_FILE} and "
        f"{CHECKPOINT_CONFIG}; expected a PEFT LoRA adapter, a Hugging Face checkpoint, or "
        f"{DESCRIPTION_FILE} alone for a tenant that is only a profile."
    )


def _listed(tree: Tree, below: str, left: int) -> tuple[Sequence[Entry], SafegeneError | None]:
    """The names in one directory, and why they may not be all (None: they are)."""
    try:
        entries = tree.entries(below, left + 1)
    except MissingFileError:
        if not below:
            raise
        return (), _unseen(tree, below, "went away while it was listed")
    except SafegeneError as error:
        return (), error
    entries = sorted(entries, key=lambda entry: _natural(entry.name))
    if len(entries) > left:
        return entries[:left], AdapterRejectedError(
            f"{tree.shown} holds more than {MAX_ENTRIES} files and directories, too many to see "
            f"that the profile in it is alone; expected {EXPECTED}: point at the adapter's own "
            f"directory, or put {DESCRIPTION_FILE} into a directory of its own."
        )
    return entries, None


def _walk(tree: Tree, top: Sequence[Entry]) -> tuple[list[str], SafegeneError | None]:
    """Weight-like names in the subdirectories, and why there may be more (None: there are not)."""
    likes: list[str] = []
    unseen: SafegeneError | None = None
    left = MAX_ENTRIES - len(top)
    waiting = deque([("", top)])
    while waiting:
        below, entries = waiting.popleft()
        for entry in entries:
            path = _path(below, entry)
            if below and _is_like(entry):
                likes.append(path)
            if entry.form == "unseen":
                where = f" (it leads to {_plain(entry.target)})" if entry.target else ""
                unseen = unseen or _unseen(tree, path, f"is not followed{where}")
            elif entry.form == "directory":
                if path.count("/") + 1 >= MAX_DEPTH:
                    unseen = unseen or _unseen(tree, path, f"is {MAX_DEPTH} levels down")
                    continue
                inner, error = _listed(tree, path, left)
                unseen = unseen or error
                left -= len(inner)
                waiting.append((path, inner))
    return likes, unseen


def _is_like(entry: Entry) -> bool:
    target = entry.target.rstrip("/").rpartition("/")[2]
    return is_weight_like(entry.name) or (bool(target) and is_weight_like(target))


def _is_adapter_pickle(name: str) -> bool:
    stem, _, suffix = name.lower().rpartition(".")
    return stem == WEIGHTS_FILE.partition(".")[0] and suffix in _PICKLES


def _tree(where: Path | Tree, *, new_profile: bool = False) -> Tree:
    """Errors: MissingFileError for a local directory that is not there."""
    if not isinstance(where, Path):
        return where
    try:
        is_there = where.is_dir()
    except OSError:
        is_there = True  # Listing it says what is wrong.
    if not is_there:
        step = ", or make an empty one for a tenant that is only a profile" if new_profile else ""
        raise MissingFileError(
            f"{where} is not a directory; expected {EXPECTED}: check the path{step}."
        )
    return LocalTree(where)


# -- messages ------------------------------------------------------------------------------------


def _incomplete(tree: Tree, missing: str, likes: Sequence[str]) -> SafegeneError:
    """The error for half an adapter, or one in a form that is not read."""
    others = [name for name in likes if name not in (CONFIG_FILE, WEIGHTS_FILE)]
    pickles = [name for name in others if name.lower().rpartition(".")[2] in _PICKLES]
    if missing == WEIGHTS_FILE and any(map(_is_adapter_pickle, others)):
        return PickleRejectedError(
            f"{tree.shown} holds {_list(pickles)} (pickle, rejected) but no {WEIGHTS_FILE}; a "
            "pickle runs code when it is read: save the adapter with safe_serialization=True."
        )
    held = f" (it holds {_list(others)})" if others else ""
    step = "finish the upload"
    if any(_MLX.fullmatch(name) for name in others):
        step = f"these are MLX's names: convert the adapter to PEFT's two files, {EXPECTED}"
    elif others:
        step = "finish the upload, or save the adapter with PEFT's save_pretrained"
    return MissingFileError(
        f"{tree.shown} has no {missing}{held}; an adapter needs {CONFIG_FILE} and {WEIGHTS_FILE}: "
        f"{step}."
    )


def _not_alone(tree: Tree, likes: Sequence[str], *, described: bool, slot: bool) -> SafegeneError:
    """The error for parts of a model in or below what is neither adapter nor checkpoint."""
    holders: dict[str, set[str]] = {}
    for path in likes:
        folder, _, name = path.rpartition("/")
        holders.setdefault(folder, set()).add(name)
    adapters = [f for f, names in holders.items() if {CONFIG_FILE, WEIGHTS_FILE} <= names]
    checkpoints = [f for f, names in holders.items() if f and CHECKPOINT_CONFIG in names]
    if adapters:
        own = f", with a {DESCRIPTION_FILE} of its own" if described else ""
        step = f"point at {_folders(tree, adapters)} instead{own}"
    elif checkpoints and slot:
        step = f"a full checkpoint is in {_folders(tree, checkpoints)}: {_OF_ITS_OWN}"
    elif checkpoints:
        step = f"point at {_folders(tree, checkpoints)} instead"
    elif any(_MLX.fullmatch(path.rpartition("/")[2]) for path in likes):
        step = "these are MLX's names: convert the adapter to PEFT's two files"
    else:
        step = (
            f"point at the directory of a PEFT LoRA adapter, or put {DESCRIPTION_FILE} into a "
            "directory of its own"
        )
    return AdapterRejectedError(
        f"{tree.shown} is neither an adapter nor a profile alone: it holds {_list(likes)}; "
        f"expected {EXPECTED}, with nothing of a model in or below the directory: {step}."
    )


def _folders(tree: Tree, folders: Sequence[str]) -> str:
    """Subdirectories as paths to choose from."""
    names = [f"{tree.shown}/{folder}" for folder in sorted(folders, key=_natural)]
    return ("one of " if len(names) > 1 else "") + _list(names)


def _unseen(tree: Tree, path: str, why: str) -> SafegeneError:
    return AdapterRejectedError(
        f"{tree.shown}/{_plain(path)} {why}, so it cannot be seen that the profile in "
        f"{tree.shown} is alone; expected {EXPECTED}: point at the adapter's own directory, or put "
        f"{DESCRIPTION_FILE} into a directory of its own."
    )


def _list(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(_plain, names[:_SHOWN])) + more


def _plain(name: str) -> str:
    """A name of unknown origin, fit for one line of a log and for UTF-8."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= 500 else f"{name[:500]}..."


def _path(below: str, entry: Entry) -> str:
    return f"{below}/{entry.name}" if below else entry.name


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    """A sort key with which checkpoint-500 comes before checkpoint-1000."""
    parts = re.findall(r"(\D*)(\d{0,15})", name)
    return tuple((text, int(number or -1)) for text, number in parts)
