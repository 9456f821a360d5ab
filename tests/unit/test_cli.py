"""The command line: imports, errors as one line and exit code 1, results that load."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safegene_vllm.cli import COMMANDS, main
from safegene_vllm.cli.console import bar
from safegene_vllm.cli.extract import parse_layers
from safegene_vllm.cli.options import expand_groups
from safegene_vllm.cli.profile import parse_coefficients
from safegene_vllm.composition import delta
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import Adapter, load_adapter, save_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import load_profile
from safegene_vllm.tiny_model import (
    linear_sites,
    make_model,
    random_lora_weights,
    write_family,
    write_tenant,
)

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "vllm", "transformers", "fastapi", "numpy", "peft"}
WITH_EXAMPLES = {"inspect", "degrade", "extract", "select", "calibrate", "profile"}
WITH_EXAMPLES |= {"evaluate", "report", "export"}
WITH_EXAMPLES |= {"tenant", "family", "key", "rollout", "job", "replica", "audit", "usage"}
"""Commands whose options all show an example."""
PRESENT = [
    name
    for name, module in COMMANDS.items()
    if (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
]


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a run of the command."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        code = exit_.value.code
        out, err = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a degraded sister, a family, and tenants of every kind."""
    root = tmp_path_factory.mktemp("cli")
    model = make_model("llama", root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, (0.5, 1.0))
    write_tenant(model, root / "bare", family, (0.0, 2.0), adapter=False)
    write_tenant(model, root / "plain", None, None)
    shutil.copytree(model, root / "degraded")
    tensors = load_file(model / "model.safetensors")
    for site, lora in random_lora_weights(linear_sites(model), 6, 5).items():
        tensors[f"{site}.weight"] = tensors[f"{site}.weight"] - delta(lora, 0.1)
    save_file(tensors, root / "degraded" / "model.safetensors", metadata={"format": "pt"})
    return root


# Starting


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in PRESENT)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from safegene_vllm.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as e: assert e.code == 0\n"
        f"print('LOADED', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    assert fresh(code).splitlines()[-1].split() == ["LOADED"]


@pytest.mark.parametrize("name", PRESENT)
def test_every_option_has_help(run: Run, name: str) -> None:
    import typer.main

    from safegene_vllm.cli import build_app

    outcome = run(name, "--help")
    assert outcome.code == 0 and name in outcome.out
    whole: Any = typer.main.get_command(build_app())
    command = whole.commands[name]
    parts = getattr(command, "commands", {"": command})
    for part in parts.values():
        for parameter in part.params:
            if parameter.name != "help":
                assert parameter.help, parameter.name
                if name in WITH_EXAMPLES and parameter.name not in ("method", "overwrite"):
                    assert "e.g." in parameter.help, (part.name, parameter.name)


@pytest.mark.parametrize("name", ["tenant", "family", "key", "rollout", "job", "replica"])
def test_a_group_lists_its_commands_and_each_has_an_example(run: Run, name: str) -> None:
    from importlib import import_module

    commands = import_module(f"safegene_vllm.cli.{name}").COMMANDS
    overview = run(name, "--help")
    assert overview.code == 0 and commands
    for command in commands:
        assert command in overview.out
        shown = " ".join(run(name, command, "--help").out.split())
        assert f"Example: safegene {name} {command}" in shown


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safegene_vllm", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("safegene-vllm ")


def test_a_command_without_its_module_is_not_listed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "ghost", "safegene_vllm.cli.ghost")
    assert "ghost" not in run("--help").out
    monkeypatch.setitem(sys.modules, "safegene_vllm.cli.inspect", None)
    assert "inspect" not in run("--help").out


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("x"), 1), (PermissionError(13, "Permission denied"), 1)]
)
def test_errors_are_reported_in_one_place(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("safegene_vllm.cli.inspect.describe", fail)
    outcome = run("inspect", root / "family")
    assert outcome.code == code
    assert outcome.err.startswith(f"{type(error).__name__}: ")
    assert "Traceback" not in outcome.err and outcome.out == ""


# inspect


def test_inspect_a_family(run: Run, root: Path) -> None:
    family = load_family(root / "family")
    text = run("inspect", root / "family").out
    assert "family 'tiny'" in text and family.digest in text and "q_proj (2)" in text
    facts = json.loads(run("inspect", root / "family", "--json").out)
    assert facts["kind"] == "family" and facts["bounds"] == [0.0, 3.0]
    for site in facts["sites"]:
        exact = float(delta(family.lora_weights[site["site"]], 1.0).norm())
        assert site["norm"] == pytest.approx(exact, rel=1e-4)
    for layer in facts["layers"]:
        own = [s["norm"] ** 2 for s in facts["sites"] if s["layer"] == layer["layer"]]
        assert layer["norm"] == pytest.approx(sum(own) ** 0.5)
        assert (layer["sites"], layer["ranks"]) == (7, [4])


@pytest.mark.parametrize(
    ("name", "kind", "profile"),
    [
        ("acme", "adapter", True),
        ("plain", "adapter", False),
        ("bare", "profile", True),
        ("model", "checkpoint", False),
    ],
)
def test_inspect_tenants(run: Run, root: Path, name: str, kind: str, profile: bool) -> None:
    facts = json.loads(run("inspect", root / name, "--json").out)
    assert facts["kind"] == kind and (facts["profile"] is not None) is profile
    text = run("inspect", root / name, "--family", root / "family").out
    assert ("fits" in text) is profile
    if name == "bare":
        assert facts["profile"]["coefficients"] == [0.0, 2.0]
        # One scale for all tenants: 2.0 of 3.0 is two thirds of a bar of 24.
        assert any(mark * 16 in text and mark * 17 not in text for mark in "█#")
    if kind == "checkpoint":
        assert facts["dtypes"] == {"F32": facts["tensors"]} and "LlamaForCausalLM" in text


def _truncate(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _alter(directory: Path) -> None:
    path = directory / "safegene.json"
    path.write_text(path.read_text().replace('"tiny"', '"other"').replace("1.0", "0.9"))


def _pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("name", ["family", "acme"])
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_truncate, "TruncatedFileError"),
        (_alter, "DigestError"),
        (_pickle, "PickleRejectedError"),
        (_empty, "MissingFileError"),
        (shutil.rmtree, "MissingFileError"),
    ],
)
def test_bad_directories_exit_1_with_the_errors_name(
    run: Run,
    root: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    error: str,
) -> None:
    for part in ("family", "acme"):
        shutil.copytree(root / part, tmp_path / part)
    damage(tmp_path / name)
    export = ("export", tmp_path / "acme", "--family", tmp_path / "family")
    for outcome in (
        run("inspect", tmp_path / name),
        run(*export, "--out", tmp_path / "out"),
    ):
        assert outcome.code == 1
        assert outcome.err.startswith(f"{error}: ") and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_inspect_rejects_another_family(run: Run, root: Path, tmp_path: Path) -> None:
    write_family(root / "model", tmp_path / "other", seed=99)
    outcome = run("inspect", root / "acme", "--family", tmp_path / "other")
    assert outcome.code == 1 and outcome.err.startswith("FamilyMismatchError: ")


# extract


def test_extract_from_checkpoints(run: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    arguments = ("extract", root / "model", root / "degraded", "--rank", 6, "--out", out)
    outcome = run(*arguments, "--bounds", 0, 1.5, "--layers", "1", "--name", "six")
    assert outcome.code == 0 and "100.00%" in outcome.out, outcome.err
    header = load_family(out).header
    assert (header.name, header.bounds) == ("six", (0.0, 1.5))
    assert [entry.layer for entry in header.layers] == [1]
    digest = header.digest
    again = run(*arguments)
    assert again.code == 1 and "--overwrite" in again.err and load_family(out).digest == digest
    assert run(*arguments, "--overwrite").code == 0
    family = load_family(out)
    assert family.header.name == "f" and len(family.lora_weights) == 14
    ours = load_file(root / "model" / "model.safetensors")
    theirs = load_file(root / "degraded" / "model.safetensors")
    for site, lora in family.lora_weights.items():
        name = f"{site}.weight"
        torch.testing.assert_close(theirs[name] + delta(lora, 1.0), ours[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("option", "sign"), [("--degraded-adapter", -1), ("--aligned-adapter", 1)])
def test_extract_from_a_lora(run: Run, root: Path, tmp_path: Path, option: str, sign: int) -> None:
    outcome = run(
        *("extract", root / "model", option, root / "plain", "--out", tmp_path / "f"),
        *("--sites", "q_proj,mlp.up_proj", "--dtype", "float32"),
    )
    assert outcome.code == 0, outcome.err
    family, adapter = load_family(tmp_path / "f"), load_adapter(root / "plain")
    assert len(family.lora_weights) == 4
    for site, lora in family.lora_weights.items():
        assert torch.equal(lora.a, adapter.lora_weights[site].a)
        assert torch.equal(lora.b, adapter.lora_weights[site].b * sign)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model"], "one of DEGRADED"),
        (["model", "degraded", "--aligned-adapter", "plain"], "one of DEGRADED"),
        (["model", "--aligned-adapter", "plain", "--rank", "4"], "own rank"),
        (["model", "degraded", "--layers", "1-x"], "0-3,7"),
        (["model", "degraded", "--layers", "5"], "outside 0..1"),
        (["model", "degraded", "--sites", "nope"], "q_proj"),
        (["model", "degraded", "--device", "abacus"], "abacus"),
    ],
)
def test_extract_rejects_invalid_options(
    run: Run, root: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    found = [str(root / a) if (root / a).exists() else a for a in arguments]
    outcome = run("extract", *found, "--out", tmp_path / "f")
    assert outcome.code == 1 and outcome.err.startswith("ConfigError: ") and words in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_extract_names_both_checkpoints_of_two_families(
    run: Run, root: Path, tmp_path: Path
) -> None:
    other = make_model("llama", tmp_path / "wide", intermediate_size=256)
    outcome = run("extract", root / "model", other, "--out", tmp_path / "f")
    assert outcome.code == 1 and outcome.err.startswith("FamilyMismatchError: ")
    assert str(root / "model") in outcome.err and str(other) in outcome.err
    assert not (tmp_path / "f").exists()


# profile


def test_profile_makes_and_updates(run: Run, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "plain", tmp_path / "t")

    def profile(*arguments: str) -> tuple[float, ...]:
        outcome = run("profile", root / "family", "--out", tmp_path / "t", *arguments)
        assert outcome.code == 0, outcome.err
        return load_profile(tmp_path / "t").coefficients

    assert profile("--coefficient", "0.6") == (0.6, 0.6)
    assert profile("--coefficients", "1:1.5") == (0.6, 1.5)
    assert profile("--coefficient", "0", "--coefficients", "0:2") == (2.0, 0.0)
    assert profile("--coefficients", "0-1:0.25") == (0.25, 0.25)
    assert (
        load_adapter(tmp_path / "t").lora_weights.keys()
        == load_adapter(root / "plain").lora_weights.keys()
    )
    run("profile", root / "family", "--coefficients", "1:1", "--out", tmp_path / "new")
    assert load_profile(tmp_path / "new").coefficients == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "ConfigError"),
        (["--coefficients", "1"], "ConfigError"),
        (["--coefficients", "0:1,0:2"], "ConfigError"),
        (["--coefficients", "7:1"], "BoundsError"),
        (["--coefficient", "9"], "BoundsError"),
        (["--coefficient", "nan"], "BoundsError"),
    ],
)
def test_profile_rejects(
    run: Run, root: Path, tmp_path: Path, arguments: list[str], error: str
) -> None:
    outcome = run("profile", root / "family", *arguments, "--out", tmp_path / "t")
    assert outcome.code == 1 and outcome.err.startswith(f"{error}: ")
    assert not (tmp_path / "t").exists()


def test_profile_rejects_another_family(run: Run, root: Path, tmp_path: Path) -> None:
    write_family(root / "model", tmp_path / "other", seed=99)
    shutil.copytree(root / "acme", tmp_path / "acme")
    arguments = ("profile", tmp_path / "other", "--out", tmp_path / "acme")
    outcome = run(*arguments, "--coefficients", "0:1")
    assert outcome.code == 1 and outcome.err.startswith("FamilyMismatchError: ")
    assert run(*arguments, "--coefficient", "1").code == 0
    lora_weights = random_lora_weights({"model.layers.0.self_attn.q_proj": (64, 64)}, 2, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "small", base_model=None)
    for out in (tmp_path / "small", root / "family"):
        outcome = run("profile", root / "family", "--coefficient", "1", "--out", out)
        assert outcome.code == 1


# export


def test_export_an_adapter(run: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("export", root / "acme", "--family", root / "family", "--out", out)
    outcome = run(*arguments, "--dtype", "bfloat16")
    assert outcome.code == 0 and "rank 8; vLLM needs --max-lora-rank 8" in outcome.out, outcome.err
    assert {lora.a.dtype for lora in load_adapter(out).lora_weights.values()} == {torch.bfloat16}
    assert run(*arguments).code == 1
    assert run(*arguments, "--overwrite").code == 0
    assert "in these weights" in run("inspect", out).out
    outcome = run("profile", root / "family", "--coefficient", "1", "--out", out)
    assert outcome.code == 1 and outcome.err.startswith("AdapterRejectedError: ")


def test_export_a_checkpoint_by_each_form_of_options(run: Run, root: Path, tmp_path: Path) -> None:
    common = ("--family", root / "family", "--checkpoint", root / "model")
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = run("export", *common, "--adapter", root / "acme", "--out", one)
    assert outcome.code == 0 and "14 weights merged" in outcome.out, outcome.err
    assert run("export", root / "acme", *common, "--out", two).code == 0
    weights = "model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()
    shutil.copytree(root / "model", tmp_path / "tenant")
    shutil.copy(root / "bare" / "safegene.json", tmp_path / "tenant")
    own = ("--family", root / "family", "--checkpoint", tmp_path / "tenant")
    assert run("export", *own, "--out", tmp_path / "three").code == 0
    given = (*common, "--profile", root / "bare" / "safegene.json")
    assert run("export", *given, "--out", tmp_path / "four").code == 0
    three, four = tmp_path / "three" / weights, tmp_path / "four" / weights
    assert three.read_bytes() == four.read_bytes() != (one / weights).read_bytes()
    assert not (tmp_path / "three" / "safegene.json").exists()


def test_export_rejects_invalid_options(run: Run, root: Path, tmp_path: Path) -> None:
    family = ("--family", root / "family")
    out = ("--out", tmp_path / "out")
    for arguments, error in (
        ((*family, *out), "ConfigError"),
        ((root / "acme", *family, "--adapter", root / "acme", *out), "ConfigError"),
        ((root / "acme", *family, "--out", root / "acme", "--overwrite"), "ConfigError"),
        ((root / "acme", *family, "--out", root / "family", "--overwrite"), "ConfigError"),
        ((root / "acme", *family, "--out", root / "bare", "--overwrite"), "FormatError"),
        ((root / "plain", *family, *out), "MissingFileError"),
        (
            (root / "acme", *family, "--checkpoint", root / "model", "--dtype", "float32", *out),
            "ConfigError",
        ),
        ((root / "model", *family, "--profile", root / "bare", *out), "ConfigError"),
    ):
        outcome = run("export", *arguments)
        assert outcome.code == 1 and outcome.err.startswith(f"{error}: "), outcome
    assert load_profile(root / "bare") and load_family(root / "family")
    assert list(tmp_path.iterdir()) == []


# Parsing


def test_parse_layers_and_coefficients() -> None:
    assert parse_layers("3, 0-2,2") == (0, 1, 2, 3)
    assert parse_coefficients("0:0.5,2-3:-1e-1") == {0: 0.5, 2: -0.1, 3: -0.1}
    for text in ("", "a", "1-", "-1", "2-1", "1,,2", "99999999999"):
        with pytest.raises(ConfigError):
            parse_layers(text)
    for text in ("", ":1", "0:", "0=1", "0:x", "0-1:1,1:2"):
        with pytest.raises(ConfigError):
            parse_coefficients(text)


def test_a_range_of_coefficients_is_of_the_layers_with_a_vector() -> None:
    assert parse_coefficients("1-6:0.8,9:1", carried=[2, 4, 7]) == {2: 0.8, 4: 0.8, 9: 1.0}
    with pytest.raises(ConfigError, match="no layer in 5-6 has a vector; expected some of 2, 4, 7"):
        parse_coefficients("5-6:0.8", carried=[7, 4, 2])


def test_bars_are_proportional() -> None:
    assert len(bar(1.0, 1.0, width=8)) == 8 == len(bar(-2.0, 1.0, width=8))
    assert bar(0.0, 1.0) == bar(0.0, 0.0) == ""
    assert len(bar(0.5, 1.0, width=8).rstrip()) == 4


# Suggestions and completion


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["inspct"], "'inspect'"),
        (["tenant", "lst"], "'list'"),
        (["inspect", "x", "--familly", "f"], "--family"),
        (["tenant", "list", "--jsn"], "--json"),
    ],
)
def test_a_wrong_command_or_option_proposes_the_nearest(
    run: Run, arguments: list[str], suggestion: str
) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2 and suggestion in outcome.err and outcome.out == ""


def test_shell_completion_completes_commands_and_shared_options() -> None:
    def complete(words: str, last: int) -> str:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.argv[0] = 'safegene'\nfrom safegene_vllm.cli import main; main()",
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "_SAFEGENE_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(last),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    assert "tenant" in complete("safegene ten", 1).split()
    assert "--key-file" in complete("safegene tenant list --key", 3).split()


# Groups of options


def test_a_group_of_options_is_expanded_into_a_commands_own() -> None:
    @dataclass(frozen=True)
    class Group:
        depth: int = 3

    given: list[object] = []

    def command(name: str, group: Group, last: bool = False) -> None:
        given.append((name, group, last))

    command.__annotations__["group"] = Group
    expanded = expand_groups(command)
    assert list(inspect.signature(expanded).parameters) == ["name", "depth", "last"]
    expanded(name="a", depth=4, last=True)
    assert given == [("a", Group(4), True)]
