"""`safegene report`: write an HTML page about one or more evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegene_vllm.cli.console import results
from safegene_vllm.errors import ConfigError


def parse_tenant(text: str) -> tuple[str, Path]:
    """Parse `NAME=DIR`. Errors: ConfigError."""
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise ConfigError(
            f"--tenant: {text!r} is not NAME=DIR; write for example acme=tenants/acme"
        )
    return name, Path(directory)


def check_file(out: Path, *sources: Path, overwrite: bool) -> None:
    """Raise ConfigError if `out` is one of the `sources`, or exists and may not be replaced."""
    if any(out.resolve() == source.resolve() for source in sources):
        raise ConfigError(f"--out {out} is an input as well; name another file")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file, e.g. {out / 'report.html'}")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists; name a new file, or replace it by --overwrite")


def _names(paths: list[Path]) -> list[str]:
    """File names, numbered where two are equal."""
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, 1)
    ]


def report(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            help="Results of `safegene evaluate`, e.g. evaluation.json; may be several."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output page, e.g. --out report.html.")],
    family: Annotated[
        Path | None,
        typer.Option(
            help="The evaluated family, for its layer scores and its recipe, "
            "e.g. --family families/qwen."
        ),
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A tenant's directory, for its calibration record, e.g. --tenant "
            "acme=tenants/acme. May be repeated.",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help='The heading of the page, e.g. --title "Qwen, spring".')
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the existing page at OUT.")
    ] = False,
) -> None:
    """Write an HTML page about evaluations: rates, plots, sample responses, provenance.

    The page needs no network and has no scripts.

    Example: safegene report evaluation.json --family families/qwen --out report.html
    """
    tenants = [parse_tenant(text) for text in tenant or ()]
    names = [name for name, _ in tenants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tenant: {', '.join(twice)} given twice; give each tenant once")
    check_file(out, *evaluations, overwrite=overwrite)
    try:
        from safegene_vllm.report.report import TITLE, write_report
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("jinja2", "markupsafe", "matplotlib"):
            raise
        raise ConfigError(
            f"{package} is not installed; reports need it: pip install 'safegene-vllm[recipe]'"
        ) from error
    from safegene_vllm.evaluation.results import load_evaluation
    from safegene_vllm.formats.family import read_family_header
    from safegene_vllm.formats.profile import load_profile

    loaded = [load_evaluation(path) for path in evaluations]
    write_report(
        dict(zip(_names(evaluations), loaded, strict=True)),
        out,
        family=None if family is None else read_family_header(family),
        profiles={name: load_profile(directory) for name, directory in tenants},
        title=TITLE if title is None else title,
    )
    results().print(f"{out}  {out.stat().st_size / 1000:.0f} kB")
