"""Directories that people give as a tenant and that are none: what trainers and tools leave.

Each is made around a `safegene.json`, if there is one: without a rejection the base would be served
under the tenant's name. Files of models are names with a few bytes: names alone decide.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Layout:
    """`make(place, adapter)` fills a directory that is there; `words` are what a rejection of a
    tenant in a LoRA slot says, `checkpoint` whether it is a full checkpoint; `local`: only a local
    directory can look like this."""

    make: Callable[[Path, Path], None]
    words: tuple[str, ...]
    checkpoint: bool = False
    local: bool = False


def _files(*names: str) -> Callable[[Path, Path], None]:
    def make(place: Path, adapter: Path) -> None:
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"{}")

    return make


def _adapters(*folders: str) -> Callable[[Path, Path], None]:
    def make(place: Path, adapter: Path) -> None:
        for folder in folders:
            (place / folder).mkdir(parents=True)
            for name in ADAPTER:
                shutil.copy(adapter / name, place / folder / name)
        _files("README.md", "trainer_state.json")(place, adapter)

    return make


def _link_out(place: Path, adapter: Path) -> None:
    (place / "latest").symlink_to(adapter)


def _link_to_weights(place: Path, adapter: Path) -> None:
    (place / "current").symlink_to(adapter / ADAPTER[1])


def _unreadable(place: Path, adapter: Path) -> None:
    (place / "private").symlink_to("/nowhere/at/all")


def _many(place: Path, adapter: Path) -> None:
    (place / "logs").mkdir()
    for number in range(4097):
        (place / "logs" / f"{number}.txt").touch()


_FULL = ("is a full checkpoint", "--load-format safegene", "convert it to a LoRA adapter")
_HERE = ("neither an adapter nor a profile alone", "expected adapter_config.json and")

LAYOUTS: dict[str, Layout] = {
    "checkpoint": Layout(
        _files("config.json", "model.safetensors", "tokenizer.json"),
        (*_FULL, "(config.json, model.safetensors)"),
        checkpoint=True,
    ),
    "sharded checkpoint": Layout(
        _files(
            "config.json",
            *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            "model.safetensors.index.json",
        ),
        (*_FULL, "model-00001-of-00002.safetensors"),
        checkpoint=True,
    ),
    "pickled checkpoint": Layout(
        _files("config.json", "pytorch_model.bin"), (*_FULL, "pytorch_model.bin"), checkpoint=True
    ),
    "checkpoint without config": Layout(
        _files("model.safetensors"), (*_FULL, "(model.safetensors)"), checkpoint=True
    ),
    "checkpoint without weights": Layout(
        _files("config.json"), (*_FULL, "(config.json)"), checkpoint=True
    ),
    "GGUF model": Layout(_files("model-q4.gguf"), (*_FULL, "model-q4.gguf"), checkpoint=True),
    "named adapter": Layout(_adapters("sales"), (*_HERE, "point at {place}/sales instead")),
    "trainer's checkpoints": Layout(
        _adapters("checkpoint-1000", "checkpoint-500"),
        (*_HERE, "point at one of {place}/checkpoint-500, {place}/checkpoint-1000 instead"),
    ),
    "trainer's output with its arguments": Layout(
        lambda place, adapter: (
            _adapters("checkpoint-500")(place, adapter),
            _files("training_args.bin")(place, adapter),
        )[1],
        (*_HERE, "holds training_args.bin", "point at {place}/checkpoint-500 instead"),
    ),
    "checkpoint in a subdirectory": Layout(
        _files("out/config.json", "out/model.safetensors"),
        (
            *_HERE,
            "out/config.json",
            "a full checkpoint is in {place}/out",
            "--load-format safegene",
        ),
    ),
    "adapter five levels down": Layout(
        _adapters("a/b/c/d/e"), (*_HERE, "point at {place}/a/b/c/d/e instead")
    ),
    "MLX": Layout(
        _files("adapter_config.json", "adapters.safetensors", "0000100_adapters.safetensors"),
        ("no adapter_model.safetensors", "adapters.safetensors", "MLX's names", "PEFT's two files"),
    ),
    "MLX without config": Layout(
        _files("adapters.safetensors"), (*_HERE, "adapters.safetensors", "MLX's names")
    ),
    "MLX in a subdirectory": Layout(
        _files("adapters/adapter_config.json", "adapters/adapters.npz"),
        (*_HERE, "adapters/adapters.npz", "MLX's names"),
    ),
    "adapter as a pickle": Layout(
        _files("adapter_config.json", "adapter_model.bin"),
        ("adapter_model.bin (pickle, rejected)", "safe_serialization=True"),
    ),
    "pickle in a subdirectory": Layout(
        _files("sales/adapter_model.bin"), (*_HERE, "sales/adapter_model.bin")
    ),
    "config alone": Layout(
        _files("adapter_config.json"), ("no adapter_model.safetensors", "finish the upload")
    ),
    "weights alone": Layout(
        _files("adapter_model.safetensors"), ("no adapter_config.json", "finish the upload")
    ),
    "upload in progress": Layout(
        _files(".adapter_model.safetensors.6eF3a2"), (*_HERE, ".adapter_model.safetensors.6eF3a2")
    ),
    "archive": Layout(_files("sales.tar.gz"), (*_HERE, "sales.tar.gz")),
    "upper case": Layout(_files("ADAPTER.SAFETENSORS"), (*_HERE, "ADAPTER.SAFETENSORS")),
    "link to an adapter's directory": Layout(
        _link_out, ("latest is not followed (it leads to ", "cannot be seen"), local=True
    ),
    "link to weights": Layout(_link_to_weights, (*_HERE, "current"), local=True),
    "link to nothing": Layout(
        _unreadable, ("private is not followed (it leads to /nowhere/at/all)",), local=True
    ),
    "too many files": Layout(_many, ("more than 4096 files", "too many to see"), local=True),
}


def make(layout: str, place: Path, adapter: Path, profile: Path | None) -> Path:
    """`place` as this layout, around the safegene.json in the directory `profile`, if given."""
    place.mkdir(parents=True)
    if profile is not None:
        shutil.copy(profile / "safegene.json", place / "safegene.json")
    LAYOUTS[layout].make(place, adapter)
    return place


def check_words(layout: str, place: str | Path, message: str) -> None:
    """The rejection says what was found, what was expected and the next step."""
    for words in LAYOUTS[layout].words:
        assert words.format(place=place) in message, (words, message)
    assert str(place) in message
