"""Options of `safegene tenant ...`: names, sources, coefficients, limits, calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from safegene_vllm.cli.profile import has_range, parse_coefficients
from safegene_vllm.errors import ConfigError

LIMITS = ("concurrent", "requests_per_minute", "tokens_per_minute")
NO_LIMITS = "none"
Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, e.g. acme/support.")]
Source = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URL",
        help="A LoRA adapter as the server finds it: a directory on its own machine or a URL, "
        "e.g. --source s3://models/acme/support.",
    ),
]
Publish = Annotated[
    bool,
    typer.Option(
        "--publish/--no-publish",
        help="Serve it once its checks pass, or keep it ready, e.g. --no-publish.",
    ),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=N",
        help=f"May be repeated; {', '.join(LIMITS)}, e.g. --limit concurrent=8.",
    ),
]


@dataclass(frozen=True)
class CoefficientOptions:
    """A tenant's coefficients, given in one of three ways."""

    profile: Annotated[
        Path | None,
        typer.Option(
            help="A safegene.json on this machine, or its directory, e.g. --profile tenants/acme."
        ),
    ] = None
    coefficient: Annotated[
        float | None,
        typer.Option(help="One number for every layer with a vector, e.g. --coefficient 0.6."),
    ] = None
    coefficients: Annotated[
        str | None,
        typer.Option(
            metavar="L:X,...",
            help="Single layers, or the layers with a vector in a range, e.g. --coefficients "
            "0:0.5,3-5:1.0. Other layers keep theirs; a new tenant's have 0.",
        ),
    ] = None

    def change(self, carried: Callable[[], Collection[int]] | None = None) -> dict[str, Any]:
        """Return the client's keyword argument for the option given; at most one.

        `carried` returns the layers with a vector, which a range of layers is narrowed to.
        Errors: ConfigError, and FormatError for the profile.
        """
        text = self.coefficients
        if carried is not None and text is not None and has_range(text):
            return {"layers": parse_coefficients(text, carried=carried())}
        given = {
            "coefficients": ("--coefficient", self.coefficient),
            "layers": ("--coefficients", None if text is None else parse_coefficients(text)),
            "profile": ("--profile", read_profile(self.profile)),
        }
        change = {name: value for name, (_, value) in given.items() if value is not None}
        if len(change) > 1:
            raise ConfigError(
                f"{' and '.join(given[name][0] for name in change)} are given; give one of them"
            )
        return change


def _data(option: str, what: str, example: str) -> Any:
    return typer.Option(option, help=f"{what}, e.g. {option} '{example}'.")


def _safety(prefix: str) -> Any:
    what = (
        "Harmful prompts, with safe responses or without; a data source as of `safegene calibrate`"
    )
    return _data(f"{prefix}safety", what, "advbench.csv?licence=MIT")


def _task(prefix: str) -> Any:
    what = "The tenant's own task: prompts, with responses or without"
    return _data(f"{prefix}task", what, "reviews.jsonl?licence=private")


def _benign(prefix: str) -> Any:
    what = "Harmless prompts that must still be answered"
    return _data(f"{prefix}benign", what, "lookalike.jsonl?licence=MIT")


def _shots(prefix: str) -> Any:
    option = f"{prefix}shots"
    return typer.Option(option, help=f"Examples drawn of each kind, e.g. {option} 32.")


def _seed(prefix: str) -> Any:
    return typer.Option(f"{prefix}seed", help=f"Draws the examples, e.g. {prefix}seed 1.")


OF_NEW = "--calibrate-"
"""Prefix of the calibration options of commands that have other options too."""
Safety = Annotated[list[str], _safety("--")]
Task = Annotated[list[str], _task("--")]
Benign = Annotated[list[str] | None, _benign("--")]
Shots = Annotated[int, _shots("--")]
Seed = Annotated[int, _seed("--")]
SHOTS, SEED = 16, 0


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration data for new content of a tenant."""

    calibrate_safety: Annotated[list[str] | None, _safety(OF_NEW)] = None
    calibrate_task: Annotated[list[str] | None, _task(OF_NEW)] = None
    calibrate_benign: Annotated[list[str] | None, _benign(OF_NEW)] = None
    calibrate_shots: Annotated[int, _shots(OF_NEW)] = SHOTS
    calibrate_seed: Annotated[int, _seed(OF_NEW)] = SEED

    def added_to(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """Return `change` with the client's `calibrate` argument if data are given.

        Errors: ConfigError, also if `change` gives coefficients besides.
        """
        safety, task, benign = self.calibrate_safety, self.calibrate_task, self.calibrate_benign
        if not (safety or task or benign):
            return dict(change)
        if change:
            raise ConfigError(
                f"{OF_NEW}... and coefficients or a profile are given; give one of them"
            )
        shots, seed = self.calibrate_shots, self.calibrate_seed
        return {"calibrate": draw_examples(safety, task, benign, shots, seed, prefix=OF_NEW)}


def draw_examples(
    safety: list[str] | None,
    task: list[str] | None,
    benign: list[str] | None,
    shots: int,
    seed: int,
    *,
    prefix: str = "--",
) -> dict[str, Any]:
    """Read the data sources and draw the server's `examples`, `data` and `seed` from them.

    `prefix` begins the names of the options in errors. Errors: ConfigError.
    """
    from safegene_vllm.cli.data import read_all
    from safegene_vllm.recipe.examples import check_classes, sample_rows

    read = {
        "safety": read_all(safety or [], "safety data"),
        "task": read_all(task or [], "task data", labels=True),
        "benign": read_all(benign or [], "benign data"),
    }
    found = {
        kind: sample_rows(data, shots, seed) for kind, data in read.items() if data is not None
    }
    if "safety" not in found or "task" not in found:
        raise ConfigError(
            f"give {prefix}safety and {prefix}task: calibration needs examples of both"
        )
    check_classes(found["task"])
    return {
        "examples": {
            kind: [{"prompt": row.prompt, "answer": row.answer} for row in data.rows]
            for kind, data in found.items()
        },
        "data": {kind: data.record() for kind, data in found.items()},
        "seed": seed,
    }


def parse_limits(entries: list[str]) -> dict[str, int]:
    """Parse `concurrent=8` and the like; `none` alone is no limit. Errors: ConfigError."""
    found: dict[str, int] = {}
    for entry in [] if entries == [NO_LIMITS] else entries:
        name, _, number = entry.partition("=")
        if name not in LIMITS or not number.isdecimal() or name in found:
            raise ConfigError(
                f"--limit {entry!r}: expected NAME=N, once for each of {', '.join(LIMITS)}; or "
                f"--limit {NO_LIMITS} alone"
            )
        found[name] = int(number)
    return found


def read_profile(path: Path | None) -> dict[str, Any] | None:
    """Read a safegene.json, or the one in a directory. Errors: FormatError."""
    from safegene_vllm.formats.file_io import read_json
    from safegene_vllm.formats.metadata import DESCRIPTION_FILE

    if path is None:
        return None
    return read_json(path / DESCRIPTION_FILE if path.is_dir() else path)
