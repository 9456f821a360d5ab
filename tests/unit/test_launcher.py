"""What `safegene serve` decides to run, and how it watches over it; no vLLM is started here.

The child of `launch` is a small script that answers like the server's ready route.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launched_server import free_port
from rich.console import Console

from safegene_vllm import cli, tiny_model
from safegene_vllm.errors import (
    AdapterRejectedError,
    BoundsError,
    ConfigError,
    FamilyMismatchError,
    PickleRejectedError,
    SafegeneError,
)
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, save_adapter
from safegene_vllm.formats.profile import Profile, save_profile
from safegene_vllm.launcher import Launch, ServeOptions, build_command, launch
from safegene_vllm.launcher.command import installed_plugins
from safegene_vllm.launcher.process import ready_lines
from safegene_vllm.launcher.startup_log import error_line
from safegene_vllm.launcher.vllm_args import VllmArgs
from safegene_vllm.launcher.vllm_install import VllmInstall

ROOT = Path(__file__).parents[2]
ELSEWHERE = VllmInstall(package=None, has_command=True, on_cpu=False)
"""vLLM as on another machine: nothing is read from it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pico base `m`, its family `f` (rank 4), tenants `t4` and `t12` by rank, a profile `p`."""
    d = tmp_path_factory.mktemp("serve")
    tiny_model.make_model("llama", d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    tiny_model.write_tenant(d / "m", d / "t4", family, 0.5, suffixes=("q_proj", "o_proj"))
    tiny_model.write_tenant(d / "m", d / "t12", family, 0.5, rank=12, suffixes=("down_proj",))
    tiny_model.write_tenant(d / "m", d / "bare", None, None, suffixes=("q_proj",))
    tiny_model.write_tenant(d / "m", d / "p", family, 0.7, adapter=False)
    shutil.copytree(d / "m", d / "full")
    shutil.copy(d / "p" / "safegene.json", d / "full" / "safegene.json")
    return SimpleNamespace(d=d, family=family, **{n.name: n for n in d.iterdir()})


def built(
    world: SimpleNamespace,
    *vllm_args: str,
    environ: dict[str, str] | None = None,
    plugins: Sequence[str] = (),
    tenants: Sequence[str] = (),
    vllm: VllmInstall = ELSEWHERE,
    **options: Any,
) -> Launch:
    options.setdefault("family", world.f)
    options.setdefault("model", str(world.m))
    return build_command(
        ServeOptions(
            tenants={name: world.d / name for name in tenants}, vllm_args=vllm_args, **options
        ),
        environ or {},
        plugins=plugins,
        vllm=vllm,
    )


def flag(launch: Launch, name: str) -> list[str]:
    return VllmArgs(launch.argv).values(name)


def config(launch: Launch) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(flag(launch, "additional-config")[0])
    return found


# -- the command ---------------------------------------------------------------------------------


def test_the_whole_command(world: SimpleNamespace) -> None:
    launch = built(world, "--port", "9000", tenants=("t4", "p"), plugins=("theirs",))
    settings = {"safegene": {"family": str(world.f), "apply": "gain"}}
    assert launch.argv == (
        sys.executable,
        *("-m", "vllm.entrypoints.cli.main", "serve", str(world.m)),
        *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "4", "--max-lora-rank", "8"),
        "--lora-target-modules",
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
        *("--lora-modules", f"t4={world.t4}", f"p={world.p}"),
        *("--worker-extension-cls", "safegene_vllm.plugin.worker_extension.RequirePlugin"),
        *("--additional-config", json.dumps(settings), "--port", "9000"),
    )
    assert launch.env == {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "VLLM_PLUGINS": "theirs,safegene,safegene_server",
    }
    assert launch.url == "http://127.0.0.1:9000"


def test_server_config_sets_the_registry_options(world: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "safegene.yaml"
    file.write_text("registry: r.sqlite\nstore: s\n")
    launch = built(world, server_config=file)
    assert launch.env["SAFEGENE_SERVER_CONFIG"] == str(file)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in launch.env
    assert flag(launch, "max-cpu-loras") == ["256"] and flag(launch, "lora-modules") == []


@pytest.mark.parametrize(
    ("vllm_args", "options", "words"),
    [
        ((), {"tenants": ("t4",)}, "the registry lists the tenants"),
        (("--lora-modules", "a=b"), {}, "the registry lists the tenants"),
        (("--api-key", "k"), {}, "keys are in the registry"),
        ((), {"missing_profile": "serve_unprotected"}, "has a profile"),
        ((), {"apply": "weights", "model": "full"}, "--apply weights"),
    ],
)
def test_contradictions_of_a_registry(
    world: SimpleNamespace,
    tmp_path: Path,
    vllm_args: tuple[str, ...],
    options: dict[str, Any],
    words: str,
) -> None:
    file = tmp_path / "safegene.yaml"
    file.write_text("registry: r.sqlite\nstore: s\n")
    if "model" in options:
        options = {**options, "model": str(world.d / options["model"])}
    with pytest.raises(SafegeneError, match=words):
        built(world, *vllm_args, server_config=file, **options)
    with pytest.raises(SafegeneError, match="no such file"):
        built(world, server_config=tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "general,platform,safegene,safegene_server"),
        ({"VLLM_PLUGINS": "mine,safegene"}, "mine,safegene,safegene_server"),
        ({"VLLM_PLUGINS": ""}, "safegene,safegene_server"),
    ],
)
def test_plugins_keep_what_the_user_had(
    world: SimpleNamespace, environ: dict[str, str], expected: str
) -> None:
    launch = built(world, environ=environ, plugins=("general", "platform"))
    assert launch.env["VLLM_PLUGINS"] == expected


def test_other_endpoint_plugins_are_not_added() -> None:
    assert "safegene_server" not in installed_plugins()


def test_runtime_lora_stays_off_where_the_user_turned_it_off(world: SimpleNamespace) -> None:
    launch = built(world, environ={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"})
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in launch.env


@pytest.mark.parametrize("form", ["--additional-config=", "--additional_config="])
def test_additional_config_is_merged(world: SimpleNamespace, form: str) -> None:
    theirs = {"other": 1, "safegene": {"missing_profile": "serve_unprotected"}}
    launch = built(world, form + json.dumps(theirs), base_profile=world.p)
    assert config(launch) == {
        "other": 1,
        "safegene": {
            "family": str(world.f),
            "apply": "gain",
            "base_profile": str(world.p),
            "missing_profile": "serve_unprotected",
        },
    }
    assert sum("additional" in token for token in launch.argv) == 1


def test_all_options_reach_the_settings(world: SimpleNamespace) -> None:
    launch = built(
        world,
        adapter_roots=(world.d,),
        apply="composed",
        missing_profile="serve_unprotected",
        tenants=("bare",),
    )
    assert config(launch)["safegene"] == {
        "family": str(world.f),
        "apply": "composed",
        "missing_profile": "serve_unprotected",
        "adapter_roots": [str(world.d)],
    }


@pytest.mark.parametrize(
    ("tenants", "apply", "expected"),
    [
        (("t4",), "gain", "8"),
        (("t4", "t12"), "gain", "16"),
        (("t4", "p"), "composed", "8"),
        (("t12",), "composed", "16"),
        (("p",), "gain", "16"),
        ((), "gain", "16"),
        ((), "composed", "32"),
    ],
)
def test_max_lora_rank_is_the_smallest_that_holds_all(
    world: SimpleNamespace, tenants: tuple[str, ...], apply: str, expected: str
) -> None:
    assert flag(built(world, tenants=tenants, apply=apply), "max-lora-rank") == [expected]


def test_composed_rank_counts_where_both_meet(world: SimpleNamespace, tmp_path: Path) -> None:
    """Rank 6 at q_proj, and the vector's 4 on top of it: 10, so 16."""
    lora_weights = tiny_model.random_lora_weights(
        {"model.layers.0.self_attn.q_proj": (128, 128)}, 6, 1
    )
    save_adapter(Adapter(lora_weights, None, {}), tmp_path, base_model=None)
    shutil.copy(world.p / "safegene.json", tmp_path / "safegene.json")
    options = ServeOptions(
        model=str(world.m), family=world.f, apply="composed", tenants={"a": tmp_path}
    )
    assert flag(build_command(options, {}, plugins=()), "max-lora-rank") == ["16"]


def test_slots_default_to_one_per_tenant_and_at_least_four(world: SimpleNamespace) -> None:
    many = {f"p{i}": world.p for i in range(6)}
    options = ServeOptions(model=str(world.m), family=world.f, tenants=many)
    launch = build_command(options, {}, plugins=())
    assert (flag(launch, "max-loras"), flag(launch, "max-cpu-loras")) == (["6"], ["6"])
    launch = build_command(replace(options, slots=2), {}, plugins=())
    assert (flag(launch, "max-loras"), flag(launch, "max-cpu-loras")) == (["2"], ["6"])


def test_given_lora_flags_win(world: SimpleNamespace) -> None:
    given = ("--enable-lora", "--max_loras", "3", "--max-lora-rank=32", "--max-cpu-loras", "3")
    launch = built(world, *given, tenants=("t4",))
    for name in ("enable-lora", "max-loras", "max-lora-rank", "max-cpu-loras"):
        count = sum(VllmArgs((token,)).given(name) for token in launch.argv)
        assert count == 1, name
    assert launch.argv[-6:] == given


@pytest.mark.parametrize("arch", ["phi3", "glm4"])
def test_target_modules_of_fused_checkpoints(arch: str, tmp_path: Path) -> None:
    tiny_model.make_model(arch, tmp_path / "m")
    tiny_model.write_family(tmp_path / "m", tmp_path / "f")
    options = ServeOptions(model=str(tmp_path / "m"), family=tmp_path / "f")
    modules = flag(build_command(options, {}, plugins=()), "lora-target-modules")
    attention = ["qkv_proj"] if arch == "phi3" else ["k_proj", "q_proj", "v_proj"]
    assert modules == sorted(["down_proj", "gate_up_proj", "o_proj", *attention])


def test_the_users_lora_modules_are_passed_on_and_checked(world: SimpleNamespace) -> None:
    theirs = json.dumps({"name": "j", "path": str(world.p), "base_model_name": "x"})
    launch = built(world, "--lora-modules", f"a={world.t12}", theirs, tenants=("t4",))
    assert flag(launch, "lora-modules") == [f"a={world.t12}", theirs, f"t4={world.t4}"]
    assert flag(launch, "max-lora-rank") == ["16"]
    with pytest.raises(AdapterRejectedError, match=r"'a' at .* has no safegene\.json"):
        built(world, "--lora-modules", f"a={world.bare}")


def test_a_path_with_a_comma_is_given_as_json(world: SimpleNamespace, tmp_path: Path) -> None:
    """vLLM reads name=path as JSON once there is a comma in it."""
    place = tmp_path / "a,b"
    shutil.copytree(world.p, place)
    options = ServeOptions(model=str(world.m), family=world.f, tenants={"x": place})
    entries = flag(build_command(options, {}, plugins=()), "lora-modules")
    assert [json.loads(entry) for entry in entries] == [{"name": "x", "path": str(place)}]


def test_keep_alive_can_be_overridden(world: SimpleNamespace) -> None:
    launch = built(world, environ={"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3"})
    assert "VLLM_HTTP_TIMEOUT_KEEP_ALIVE" not in launch.env


def test_weights_have_no_lora_flags(world: SimpleNamespace) -> None:
    launch = built(world, model=str(world.full), apply="weights")
    assert flag(launch, "load-format") == ["safegene"]
    assert not [t for t in launch.argv if "lora" in t]
    assert set(launch.env) == {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "VLLM_PLUGINS"}
    implied = built(world, "--load-format", "safegene", model=str(world.full))
    assert config(implied) == config(launch)
    assert implied.argv.count("--load-format") == 1


@pytest.mark.parametrize(
    ("args", "url", "verify"),
    [
        ((), "http://127.0.0.1:8000", False),
        (("--host", "0.0.0.0", "--port=81"), "http://127.0.0.1:81", False),
        (("--host", "::"), "http://[::1]:8000", False),
        (("--host", "10.1.2.3"), "http://10.1.2.3:8000", True),
        (("--ssl-keyfile", "k", "--ssl-certfile", "c"), "https://127.0.0.1:8000", False),
        (
            ("--ssl-keyfile", "k", "--ssl-certfile", "c", "--host", "x.org"),
            "https://x.org:8000",
            True,
        ),
    ],
)
def test_address_of_the_readiness_check(
    world: SimpleNamespace, args: tuple[str, ...], url: str, verify: bool
) -> None:
    launch = built(world, *args)
    assert (launch.url, launch.verify_tls) == (url, verify)


def test_api_keys_are_used_and_never_shown(world: SimpleNamespace) -> None:
    launch = built(world, "--api-key", "first", "second", "--seed", "1")
    assert launch.api_key == "first"
    assert "first" in launch.argv
    shown = launch.shown() + built(world, "--api_key=first").shown() + repr(launch.api_key and "")
    assert "first" not in shown and "second" not in shown and "--seed 1" in shown
    assert built(world, environ={"VLLM_API_KEY": "env"}).api_key == "env"


# -- refusals ------------------------------------------------------------------------------------

CONTRADICTIONS: list[tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]] = [
    (("--no-enable-lora",), {}, ("--no-enable-lora", "--apply gain")),
    (("--max-loras", "2"), {"slots": 3}, ("--slots 3", "--max-loras 2")),
    (("--max-cpu-loras", "2"), {"slots": 3}, ("--max-cpu-loras 2", "--max-loras 3")),
    (("--max-lora-rank", "8"), {"tenants": ("t12",)}, ("--max-lora-rank 8", "rank 12", "16")),
    (("--lora-target-modules", "q_proj"), {}, ("leaves out", "down_proj", "v_proj")),
    (("--lora-target-modules", "lm_head"), {}, ("lm_head", "prompt_logprobs")),
    (("--load-format", "dummy"), {"apply": "weights"}, ("'weights'", "--load-format dummy")),
    (("--load-format", "safegene"), {"apply": "gain"}, ("'gain'", "--load-format safegene")),
    (("--enable-lora",), {"apply": "weights"}, ("--enable-lora", "--apply weights")),
    ((), {"apply": "weights", "tenants": ("p",)}, ("--tenant", "--apply weights")),
    ((), {"apply": "weights", "slots": 2}, ("--slots", "--apply weights")),
    (("--model", "other"), {}, ("MODEL", "--model 'other'")),
    (("-dp", "2"), {}, ("--data-parallel-size 2", "one replica")),
    (("--served-model-name", "p"), {"tenants": ("p",)}, ("'p'", "base model")),
    (("--max-loras", "many"), {}, ("--max-loras = 'many'", "whole number")),
    (("--additional-config", "{"), {}, ("--additional-config", "not JSON")),
    (("--additional-config", "[1]"), {}, ("--additional-config", "JSON object")),
    (("--additional-config.a", "1"), {}, ("--additional-config.a", "one JSON object")),
    (("--additional-config", '{"safegene": 1}'), {}, ("`safegene`", "int", "object")),
    (
        ("--additional-config", '{"safegene": {"apply": "composed"}}'),
        {"apply": "gain"},
        ("--apply 'gain'", "safegene.apply = 'composed'"),
    ),
    (("--additional-config", '{"safegene": {"famly": "x"}}'), {}, ("famly", "Known keys")),
    (("--lora-modules", "nonsense"), {}, ("'nonsense'", "name=path")),
    (
        ("--worker-extension-cls", "safegene_vllm.plugin.required.Required"),
        {},
        ("required.Required", "safegene_vllm.plugin.worker_extension.RequirePlugin"),
    ),
    ((), {"slots": 0}, ("--slots 0", "at least 1")),
    ((), {"family": None}, ("--family", "missing")),
    ((), {"family": Path("/nowhere")}, ("/nowhere", "not a directory")),
    ((), {"profile": Path("x")}, ("safegene.profile", "--load-format safegene")),
]


@pytest.mark.parametrize(("args", "options", "words"), CONTRADICTIONS)
def test_contradictions_name_both_sides(
    world: SimpleNamespace, args: tuple[str, ...], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    if options.get("apply") == "weights":
        options = {"model": str(world.full), **options}
    with pytest.raises(ConfigError) as caught:
        built(world, *args, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_tenant_named_twice_is_rejected(world: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="p in both --tenant and --lora-modules"):
        built(world, "--lora-modules", f"p={world.p}", tenants=("p",))


def test_a_config_file_may_not_set_what_we_would_override(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text("seed: 1\nmax_loras: 8\nport: 1\nnested:\n  model: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sets --max-loras, --port: give them on the command"):
        built(world, "--config", str(path))
    path.write_text("seed: 1\n", encoding="utf-8")
    assert "--config" in built(world, "--config", str(path)).argv


def negative(world: SimpleNamespace, place: Path) -> None:
    save_profile(Profile(world.family.digest, (-0.5, 0.5), {}), place)


def other_family(world: SimpleNamespace, place: Path) -> None:
    save_profile(Profile("sha256:" + "0" * 64, (0.5, 0.5), {}), place)


def no_profile(world: SimpleNamespace, place: Path) -> None:
    (place / "safegene.json").unlink()


def pickle_only(world: SimpleNamespace, place: Path) -> None:
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")


def on_lm_head(world: SimpleNamespace, place: Path) -> None:
    lora: dict[str, LoRAWeights] = tiny_model.random_lora_weights({"lm_head": (320, 128)}, 2, 1)
    (place / "safegene.json").unlink()
    save_adapter(Adapter(lora, None, {}), place, base_model=None)
    shutil.copy(world.p / "safegene.json", place / "safegene.json")


def other_shape(world: SimpleNamespace, place: Path) -> None:
    lora_weights = tiny_model.random_lora_weights(
        {"model.layers.0.self_attn.q_proj": (64, 128)}, 2, 1
    )
    (place / "safegene.json").unlink()
    save_adapter(Adapter(lora_weights, None, {}), place, base_model=None)
    shutil.copy(world.p / "safegene.json", place / "safegene.json")


def gone(world: SimpleNamespace, place: Path) -> None:
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (negative, BoundsError, "coefficient -0.5, expected 0.0 to 3.0"),
        (other_family, FamilyMismatchError, "calibrate the tenant against this family"),
        (no_profile, AdapterRejectedError, "unprotected"),
        (pickle_only, PickleRejectedError, "adapter_model.bin"),
        (on_lm_head, AdapterRejectedError, "lm_head is in no layer"),
        (other_shape, AdapterRejectedError, "in family 'tiny' it is (128, 128)"),
        (gone, AdapterRejectedError, "not a directory"),
    ],
)
def test_invalid_tenants_are_rejected_before_vllm_starts(
    world: SimpleNamespace, tmp_path: Path, spoil: Any, error: type[SafegeneError], words: str
) -> None:
    place = tmp_path / "t"
    shutil.copytree(world.t4, place)
    spoil(world, place)
    options = ServeOptions(model=str(world.m), family=world.f, tenants={"acme": place})
    with pytest.raises(error) as caught:
        build_command(options, {}, plugins=())
    assert words in str(caught.value)
    assert "tenant 'acme'" in str(caught.value)


def test_adapter_roots_apply_to_tenants(world: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(world.t4)
    for name, path, words in (
        ("outside", world.t4, "outside safegene.adapter_roots"),
        ("link", tmp_path / "link", "symbolic link"),
    ):
        options = ServeOptions(
            model=str(world.m), family=world.f, tenants={name: path}, adapter_roots=(tmp_path,)
        )
        with pytest.raises(AdapterRejectedError, match=words):
            build_command(options, {}, plugins=())


def test_a_model_of_another_family_is_rejected(world: SimpleNamespace, tmp_path: Path) -> None:
    tiny_model.make_model("llama", tmp_path, intermediate_size=64)
    with pytest.raises(FamilyMismatchError, match="Serve a model of that family"):
        built(world, model=str(tmp_path))


def test_a_checkpoint_without_profile_is_rejected(world: SimpleNamespace) -> None:
    with pytest.raises(SafegeneError, match=r"safegene\.json"):
        built(world, apply="weights")
    launch = built(world, apply="weights", profile=world.p)
    assert config(launch)["safegene"]["profile"] == str(world.p)


def test_exported_weights_are_rejected(world: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(world.full, tmp_path / "m")
    (tmp_path / "m" / "safegene-export.json").write_text("{}", encoding="utf-8")
    with pytest.raises(AdapterRejectedError, match="added twice"):
        built(world, model=str(tmp_path / "m"), apply="weights")


def test_several_errors_are_reported_together(world: SimpleNamespace) -> None:
    with pytest.raises(SafegeneError) as caught:
        built(world, "--no-enable-lora", "--max-loras", "2", slots=3, tenants=("bare", "none"))
    text = str(caught.value)
    assert text.startswith("4 errors:")
    for word in ("--no-enable-lora", "--slots 3", "'bare'", "'none'"):
        assert word in text


# -- flags ---------------------------------------------------------------------------------------

words = st.from_regex(r"[a-z0-9/.{}:,\"]{1,12}", fullmatch=True)
foreign = st.lists(
    st.tuples(
        st.sampled_from(["--seed", "--dtype", "--max_model_len", "-tp", "--block-size=16"]),
        st.lists(words, max_size=3),
    ).map(lambda lora: [lora[0], *lora[1]]),
    max_size=4,
)


@given(before=foreign, after=foreign, values=st.lists(words, min_size=1, max_size=3))
def test_reading_and_removing_one_flag_leaves_the_others(
    before: list[list[str]], after: list[list[str]], values: list[str]
) -> None:
    others = tuple(token for group in before + after for token in group)
    first = tuple(token for group in before for token in group)
    flags = VllmArgs((*first, "--lora_modules", *values, *others[len(first) :]))
    assert flags.values("lora-modules") == values
    assert flags.without("lora-modules").tokens == others
    assert not flags.without("lora-modules").given("lora-modules")


def test_the_last_occurrence_of_a_flag_wins() -> None:
    flags = VllmArgs(("--port", "1", "--port=2"))
    assert (flags.value("port"), flags.without("port").tokens) == ("2", ())
    assert VllmArgs(("--enable-lora",)).value("enable-lora") is None


# -- the process ---------------------------------------------------------------------------------

CHILD = textwrap.dedent(
    """
    import http.server, json, os, sys
    port, shift, key = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

    class Ready(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            Ready.asked += 1
            status, body = 200, {"apply": "gain", "base": None, "pid": os.getpid() + shift}
            body["tenants"] = [
                {"name": "acme", "apply": "gain", "slot": 0, "layers": 2, "sites": 14},
                {"name": "late", "apply": "gain", "slot": None, "layers": 1, "sites": 7},
            ]
            if self.headers.get("Authorization") != f"Bearer {key}":
                status, body = 401, {"error": "Unauthorized"}
            elif Ready.asked == 1:
                status, body = 503, {"error": {"message": "not yet"}}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    print("listening [not markup]", flush=True)
    http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
    """
)
PARENT = textwrap.dedent(
    """
    import sys
    from rich.console import Console
    from safegene_vllm.launcher import Launch, launch
    port, child = sys.argv[1:]
    argv = (sys.executable, "-c", child, port, "0", "k")
    command = Launch(argv, {}, f"http://127.0.0.1:{port}", api_key="k")
    sys.exit(launch(command, Console(width=200), verbose=True))
    """
)


def until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on {port}")


def until_nobody_listens(port: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        except OSError:
            # A connection that waited to be taken when its server ended is reset, not refused.
            pass
        time.sleep(0.05)
    raise TimeoutError(f"somebody listens on {port}")


def test_ready_is_printed_after_the_receipts_and_signals_are_forwarded() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-u", "-c", PARENT, str(free_port()), CHILD],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert parent.stdout is not None
    lines = [parent.stdout.readline().rstrip() for _ in range(4)]
    assert lines[:3] == [
        "listening [not markup]",
        "ready: acme (gain, 2 layers, slot 0)",
        "ready: late (gain, 1 layers, not in a slot)",
    ]
    assert lines[3].startswith("serving at http://127.0.0.1:")
    parent.send_signal(signal.SIGTERM)
    rest = parent.communicate(timeout=300)[0]
    assert parent.returncode == 128 + signal.SIGTERM
    assert "exited" not in rest


DEAF = textwrap.dedent(
    """
    import signal, subprocess, sys, time
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    enough, port = int(sys.argv[1]), int(sys.argv[2])
    server = ["-m", "http.server", "--bind", "127.0.0.1", str(port)]
    engine = subprocess.Popen([sys.executable, *server])
    while len(heard) < enough:
        time.sleep(0.05)
    engine.kill()
    print("ends by itself", flush=True)
    """
)
STARTING = textwrap.dedent(
    """
    import sys
    from rich.console import Console
    from safegene_vllm.launcher import Launch, launch, process
    process.UNREADY_STOP_S = 5.0
    url, *argv = sys.argv[1:]
    sys.exit(launch(Launch((sys.executable, "-c", *argv), {}, url), Console(width=200)))
    """
)


@pytest.mark.parametrize(
    ("enough", "code", "last"),
    [
        (2, 0, "ends by itself"),
        (99, 128 + signal.SIGTERM, "vLLM did not stop during startup: killed"),
    ],
)
def test_a_server_that_ignores_sigterm_during_startup_is_killed_with_its_engine(
    enough: int, code: int, last: str
) -> None:
    url, port = f"http://127.0.0.1:{free_port()}", free_port()
    parent = subprocess.Popen(
        [sys.executable, "-u", "-c", STARTING, url, DEAF, str(enough), str(port)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert parent.stdout is not None
    until_it_listens(port)
    parent.send_signal(signal.SIGTERM)
    lines = parent.communicate(timeout=60)[0].splitlines()
    assert parent.returncode == code
    assert lines[-1] == last
    until_nobody_listens(port)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl(2) is Linux's")
def test_a_parent_that_is_killed_leaves_no_server_behind() -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PARENT, str(port), CHILD],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        while not parent.stdout.readline().startswith("serving at"):
            pass
        parent.kill()
    until_nobody_listens(port)


def run_child(code: str, *args: str, **fields: Any) -> tuple[int, str]:
    out = StringIO()
    command = Launch((sys.executable, "-c", code, *args), {}, **fields)
    return launch(command, Console(file=out, width=200)), out.getvalue()


def test_a_dead_child_is_reported_with_its_code_and_error_line() -> None:
    code = (
        "import sys; print('(EngineCore pid=1) ERROR x.py:1] ValueError: no [room]'); sys.exit(7)"
    )
    status, out = run_child(code, url=f"http://127.0.0.1:{free_port()}")
    assert status == 7
    assert out.splitlines()[-1] == "vLLM exited with code 7: ValueError: no [room]"


def test_the_environment_is_added_to_ours() -> None:
    code = "import os; print('IT', os.environ['SAFEGENE_TEST'], 'PATH' in os.environ)"
    out = StringIO()
    command = Launch(
        (sys.executable, "-c", code), {"SAFEGENE_TEST": "here"}, f"http://127.0.0.1:{free_port()}"
    )
    assert launch(command, Console(file=out)) == 1, "a server that just ends has failed"
    assert "IT here True" in out.getvalue()


def test_a_server_that_will_never_be_ready_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safegene_vllm.launcher.process.REJECTED_AFTER_S", 1.0)
    port = free_port()
    status, out = run_child(
        CHILD, str(port), "0", "right", url=f"http://127.0.0.1:{port}", api_key="wrong"
    )
    assert status != 0
    assert "does not accept this API key" in out


def test_another_process_on_the_port_is_not_our_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pid must be the child's: an older server on the same port must not make us ready."""
    port = free_port()
    older = subprocess.Popen([sys.executable, "-c", CHILD, str(port), "0", "k"])
    try:
        until_it_listens(port)
        code = "import time, sys; time.sleep(2); sys.exit('OSError: Address already in use')"
        status, out = run_child(code, url=f"http://127.0.0.1:{port}", api_key="k")
    finally:
        older.terminate()
        older.wait()
    assert status == 1
    assert "ready:" not in out
    assert "OSError: Address already in use" in out


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "(VllmWorker-0 pid=1) ERROR 11-21 22:31:16 [m.py:953]     raise "
            "VllmCompatibilityError(\n(VllmWorker-0 pid=1) ERROR 11-21 22:31:16 [m.py:953] "
            "safegene_vllm.errors.VllmCompatibilityError: SafeGene cannot protect it.\n"
            "(APIServer pid=2) RuntimeError: Engine core initialization failed. See above.\n",
            "VllmCompatibilityError: SafeGene cannot protect it.",
        ),
        (
            "ERROR safegene_vllm.errors.BoundsError: 2 errors:\n"
            "ERROR - BoundsError: layer 0\nERROR - BoundsError: layer 1\nERROR next\n",
            "BoundsError: 2 errors:\n- BoundsError: layer 0\n- BoundsError: layer 1",
        ),
        (
            "ERROR [x] ValueError: first\nTraceback (most recent call last):\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: first",
        ),
        (
            "pydantic.ValidationError: 1 validation error\n  Value error, no streams\n    more\n",
            "pydantic.ValidationError: 1 validation error\n  Value error, no streams",
        ),
        ("all is well\n", None),
        ("torch.OutOfMemoryError: none left\n", "torch.OutOfMemoryError: none left"),
    ],
)
def test_error_line(log: str, expected: str | None) -> None:
    assert error_line(log.splitlines()) == expected


def test_ready_lines_without_tenants() -> None:
    base = {"profile": "sha256:x", "layers": 30}
    weights = {"apply": "weights", "base": base, "tenants": []}
    assert list(ready_lines(weights)) == ["ready: base model (weights, 30 layers)"]
    gain = {"apply": "gain", "base": base, "tenants": []}
    assert list(ready_lines(gain)) == ["ready: base model (requests without an adapter, 30 layers)"]
    nothing = {"apply": "gain", "base": None, "tenants": []}
    assert "no tenants yet" in next(ready_lines(nothing))
    of_registry = list(ready_lines({**nothing, "registry": 7}))
    assert of_registry == ["ready: all that the registry publishes (version 7)"]
    tenant = {"name": "a", "apply": None, "slot": 1, "layers": 0}
    assert list(ready_lines({"apply": "gain", "base": None, "tenants": [tenant]})) == [
        "ready: a (UNPROTECTED, slot 1)"
    ]


# -- the command line ----------------------------------------------------------------------------


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def test_dry_run_prints_and_starts_nothing(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    tenants = ("--tenant", f"t4={world.t4}", "--tenant", f"p={world.p}")
    flags = ("--port", "9000", "-tp", "1", "--api-key", "secret", "--slots", "5")
    code = run_cli("serve", str(world.m), "--family", str(world.f), *tenants, *flags, "--dry-run")
    out = capsys.readouterr().out
    assert code == 0
    assert "VLLM_PLUGINS=" in out and "--max-loras 5" in out and "--port 9000 -tp 1" in out
    assert "secret" not in out


DECLARED = """
registry: r.sqlite
store: s
serve:
  model: m
  family: f
  slots: 3
  vllm: {port: 9000, max_lora_rank: 8, enforce_eager: true, enable_prefix_caching: false,
         served_model_name: [one, two], limit_mm_per_prompt: {image: 0}}
"""


def test_serve_from_one_file(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").symlink_to(world.m)
    (tmp_path / "f").symlink_to(world.f)
    file = tmp_path / "safegene.yaml"
    file.write_text(DECLARED)
    assert run_cli("serve", "--server-config", str(file), "--port", "9001", "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        str(tmp_path / "m"),
        "--max-loras 3",
        "--max-lora-rank 8",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--served-model-name one two",
        "--port 9001",
    ):
        assert words in out, words
    assert "limit-mm-per-prompt" in out and '"image": 0' in out
    assert "--max-loras 4" in given(file, "--slots", "4", capsys)
    assert "--max-loras 3" in given(file, "--dtype", "float32", capsys)


def given(file: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run_cli("serve", "--server-config", str(file), flag, value, "--dry-run") == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("registry: r\nstore: s\n", "no `serve:` part"),
        ("- a\n", "no `serve:` part"),
        ("serve: {model: m}\n", "serve.family"),
        ("serve: {model: m, family: f, color: red}\n", "serve.color"),
        ("serve: {model: m, family: f, apply: weights}\n", "serve.apply"),
        ("serve: {model: m, family: f, slots: 0}\n", "serve.slots"),
        ("serve: {model: [\n", "is not YAML"),
        ("registry: postgresql://u:hush@h/db: x\n", "line 1 is not YAML: mapping values"),
    ],
)
def test_invalid_serve_part(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "safegene.yaml"
    file.write_text(text)
    assert run_cli("serve", "--server-config", str(file), "--dry-run") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert words in told and "hush" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--port", "1", "model"), "MODEL comes first"),
        (("serve",), "MODEL comes first"),
        (("serve", "m", "--tenant", "acme"), "expected NAME=DIR"),
        (("serve", "m", "--tenant", "a=x", "--tenant", "a=y"), "given twice"),
        (("serve", "m"), "--family is missing"),
    ],
)
def test_errors_of_the_command_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*arguments) != 0
    assert words in capsys.readouterr().err
