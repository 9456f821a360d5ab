"""What `safegene tenant ...` takes from its options: names, sources, coefficients, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safegene_vllm.cli.profile import parse_coefficients
from safegene_vllm.errors import ConfigError

LIMITS = ("concurrent", "requests_per_minute", "tokens_per_minute")
NO_LIMITS = "none"
Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant, e.g. acme/support.")]
Source = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|URL",
        help="A LoRA adapter, where the server finds it: a directory of its own machine or a URL, "
        "e.g. --source s3://models/acme/support.",
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        help="A safegene.json of this machine, or the directory it is in, e.g. --profile "
        "tenants/acme."
    ),
]
Publish = Annotated[
    bool,
    typer.Option(
        "--publish/--no-publish",
        help="Serve it once it has passed, or keep it ready, e.g. --no-publish.",
    ),
]
Coefficient = Annotated[
    float | None,
    typer.Option(help="One number for every layer with a vector, e.g. --coefficient 0.6."),
]
Coefficients = Annotated[
    str | None,
    typer.Option(
        metavar="L:X,...",
        help="Single layers or ranges, e.g. --coefficients 0:0.5,3-5:1.0. Other layers keep "
        "theirs; a new tenant's have 0.",
    ),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=N",
        help=f"May be repeated; {', '.join(LIMITS)}, e.g. --limit concurrent=8.",
    ),
]


def _data(prefix: str, kind: str, what: str, example: str) -> Any:
    option = f"{prefix}{kind}"
    return typer.Option(option, help=f"{what}, e.g. {option} '{example}'.")


def _safety(prefix: str) -> Any:
    what = "Harmful prompts, with safe answers or without; a data source as of `safegene calibrate`"
    return _data(prefix, "safety", what, "advbench.csv?licence=MIT")


def _task(prefix: str) -> Any:
    what = "The tenant's own task: prompts, with answers or without"
    return _data(prefix, "task", what, "reviews.jsonl?licence=private")


def _benign(prefix: str) -> Any:
    what = "Harmless prompts that must still be answered"
    return _data(prefix, "benign", what, "lookalike.jsonl?licence=MIT")


def _shots(prefix: str) -> Any:
    option = f"{prefix}shots"
    return typer.Option(option, help=f"Examples drawn of each kind, e.g. {option} 32.")


def _seed(prefix: str) -> Any:
    return typer.Option(f"{prefix}seed", help=f"Draws the examples, e.g. {prefix}seed 1.")


OF_NEW = "--calibrate-"
"""How the options of a calibration begin where there is more to say than that."""
Safety = Annotated[list[str], _safety("--")]
Task = Annotated[list[str], _task("--")]
Benign = Annotated[list[str] | None, _benign("--")]
Shots = Annotated[int, _shots("--")]
Seed = Annotated[int, _seed("--")]
NewSafety = Annotated[list[str] | None, _safety(OF_NEW)]
NewTask = Annotated[list[str] | None, _task(OF_NEW)]
NewBenign = Annotated[list[str] | None, _benign(OF_NEW)]
NewShots = Annotated[int, _shots(OF_NEW)]
NewSeed = Annotated[int, _seed(OF_NEW)]
SHOTS, SEED = 16, 0


def parse_limits(entries: list[str]) -> dict[str, int]:
    """`concurrent=8` and the like as a map; `none` alone is no limit. Errors: ConfigError."""
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
    """The content of a safegene.json, or of the one in a directory. Errors: FormatError."""
    from safegene_vllm.formats.file_io import read_json
    from safegene_vllm.formats.metadata import DESCRIPTION_FILE

    if path is None:
        return None
    return read_json(path / DESCRIPTION_FILE if path.is_dir() else path)


def given_change(
    coefficient: float | None, coefficients: str | None, profile: Path | None
) -> dict[str, Any]:
    """What the three options say, as the client takes it; at most one. Errors: ConfigError."""
    given: dict[str, Any] = {
        "--coefficient": coefficient,
        "--coefficients": None if coefficients is None else parse_coefficients(coefficients),
        "--profile": read_profile(profile),
    }
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are given; give one of them")
    words = {"--coefficient": "coefficients", "--coefficients": "layers", "--profile": "profile"}
    return {words[option]: given[option] for option in named}
