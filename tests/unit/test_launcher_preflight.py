"""Mistakes that `safegene serve` reports before vLLM starts; no vLLM is started here."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safegene_vllm import cli, model_source, tiny_model
from safegene_vllm.errors import ConfigError, MissingFileError, SafegeneError
from safegene_vllm.launcher import Launch, ServeOptions, build_command, check_address
from safegene_vllm.launcher.cpu_memory import Memory, kv_cache_arguments, read_memory
from safegene_vllm.launcher.preflight import config_schema, unwritable
from safegene_vllm.launcher.vllm_args import VllmArgs
from safegene_vllm.launcher.vllm_install import (
    COMMAND,
    ENTRY,
    OLDER_ENTRY,
    VllmInstall,
    unknown_flags,
)

GOOD = "registry: r.sqlite\nstore: store\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny base `m`, its family `f` and a tenant `t`."""
    d = tmp_path_factory.mktemp("preflight")
    tiny_model.make_model("llama", d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    tiny_model.write_tenant(d / "m", d / "t", family, 0.5, suffixes=("q_proj",))
    return SimpleNamespace(d=d, family=family, **{n.name: n for n in d.iterdir()})


@pytest.fixture
def vllm(tmp_path: Path) -> VllmInstall:
    """Sources of a vLLM with a few flags, as its parsers write them."""
    package = tmp_path / "vllm"
    for file, text in {
        "engine/arg_utils.py": """
            def add(group):
                group.add_argument("--model", **m)
                group.add_argument("--max-model-len", "--max_len_alias", "-mml", **x)
                group.add_argument("--additional-config", "--tensor-parallel-size", "-tp")
                group.add_argument("--enable-prefix-caching", "--lora-modules", **y)
                group.help = "--not a flag"
        """,
        "entrypoints/launchers/cli_args.py": """
            class BaseFrontendArgs:
                allow_credentials: bool = False
            class FrontendArgs(BaseFrontendArgs):
                port: int = 8000
            class Other:
                not_a_flag: int = 1
        """,
        "entrypoints/cli/main.py": "",
        "entrypoints/launchers/api_server/entry.py": "",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        (package / file).write_text("\n".join(line[12:] for line in lines))
    return VllmInstall(package=package, has_command=True, on_cpu=False)


def built(
    world: SimpleNamespace,
    *vllm_args: str,
    vllm: VllmInstall | None = None,
    environ: dict[str, str] | None = None,
    **options: Any,
) -> Launch:
    options = {"model": str(world.m), "family": world.f, **options}
    vllm = vllm or VllmInstall(package=None, has_command=True, on_cpu=False)
    return build_command(
        ServeOptions(vllm_args=vllm_args, **options), environ or {}, plugins=(), vllm=vllm
    )


def rejected(world: SimpleNamespace, *vllm_args: str, **options: Any) -> str:
    with pytest.raises(SafegeneError) as caught:
        built(world, *vllm_args, **options)
    return str(caught.value)


# -- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--tensor-paralel-size", "--tensor-parallel-size"),
        ("--max_model_length=4", "--max-model-len"),
        ("--no-enable-prefix-cashing", "--enable-prefix-caching"),
        ("--lora-mod", "--lora-modules"),
        ("--colour", None),
    ],
)
def test_an_unknown_flag_is_rejected_with_the_nearest_one(
    world: SimpleNamespace, vllm: VllmInstall, flag: str, nearest: str | None
) -> None:
    message = rejected(world, flag, "2", vllm=vllm)
    assert flag.partition("=")[0].replace("_", "-") in message
    assert (f"did you mean {nearest!r}?" in message) if nearest else ("did you" not in message)


def test_known_flags_pass_in_every_form(world: SimpleNamespace, vllm: VllmInstall) -> None:
    flags = ("--max_model_len=64", "-tp", "1", "--no-enable-prefix-caching", "--port", "9")
    built(world, *flags, "--allow-credentials", "--max-model-len.x", "1", vllm=vllm)


def test_flags_that_cannot_be_read_are_left_to_vllm(tmp_path: Path) -> None:
    flags = VllmArgs(("--anything",))
    for package in (None, tmp_path):
        assert unknown_flags(flags, VllmInstall(package, has_command=True, on_cpu=False)) == []


def test_the_vllm_command_is_used_where_it_works(vllm: VllmInstall) -> None:
    assert vllm.command("m")[1:] == ["-m", COMMAND, "serve", "m"]
    package = vllm.package
    assert package is not None
    without = VllmInstall(package, has_command=False, on_cpu=True)
    assert without.command("m")[1:] == ["-m", ENTRY, "--model", "m"]
    (package / "entrypoints/launchers/api_server/entry.py").unlink()
    assert without.command("m")[1:] == ["-m", OLDER_ENTRY, "--model", "m"]


@pytest.mark.parametrize(
    ("vllm_args", "environ", "word"),
    [
        (("--grpc",), {}, "--grpc"),
        (("--headless",), {}, "--headless"),
        (("--omni",), {}, "--omni"),
        (("--api-server-count", "2"), {}, "--api-server-count 2"),
        (("-asc", "2"), {}, "--api-server-count 2"),
        ((), {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND"),
    ],
)
def test_servers_without_our_routes_are_rejected(
    world: SimpleNamespace, vllm_args: tuple[str, ...], environ: dict[str, str], word: str
) -> None:
    assert word in rejected(world, *vllm_args, environ=environ)


def test_a_registry_with_a_key_of_vllm_is_rejected(world: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "safegene.yaml"
    file.write_text(GOOD)
    message = rejected(world, server_config=file, environ={"VLLM_API_KEY": "hush-hush"})
    assert "VLLM_API_KEY with --server-config" in message and "hush" not in message


def test_secrets_are_masked_in_the_log(world: SimpleNamespace) -> None:
    environ = {"VLLM_API_KEY": "hush-1", "HF_TOKEN": "hush-2"}
    launch = built(world, "--api-key", "hush-3", "hush-4", "--hf-token", "hush-5", environ=environ)
    assert {f"hush-{n}" for n in range(1, 6)} <= set(launch.secrets)


# -- model ---------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(model: str, revision: str | None) -> None:
        raise AssertionError(f"{model} was looked up on the Hub")

    monkeypatch.setattr(model_source, "_look_up_on_hub", look_up)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{d}/mm", "no such directory (did you mean 'm'?)"),
        ("./no/where", "no such directory"),
        ("../m/", "no such directory"),
        ("~/no-such-model-here", "no such directory"),
        ("a/b/c", "no such directory"),
        ("{d}/t", "is a LoRA adapter, expected the base model"),
        ("{d}/m/config.json", "is a file"),
        ("{d}/outer", "has no config.json; expected a model directory (did you mean"),
    ],
)
def test_a_missing_path_is_rejected_without_the_hub(
    world: SimpleNamespace, no_hub: None, model: str, words: str
) -> None:
    (world.d / "outer" / "checkpoint-5").mkdir(parents=True, exist_ok=True)
    (world.d / "outer" / "checkpoint-5" / "config.json").write_text("{}")
    assert words in rejected(world, model=model.format(d=world.d))


def test_a_path_below_a_local_directory_is_no_hub_id(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "aligned").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=r"no such directory \(did you mean 'aligned'\?\)"):
        model_source.check_model("models/aligned2")


def hub(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Replace the Hub; returns the list of models that are looked up."""
    seen: list[str] = []

    class Api:
        def model_info(self, repo: str, **_: Any) -> None:
            seen.append(repo)
            if error is not None:
                raise error

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return seen


def test_a_hub_id_is_looked_up_once_and_never_where_it_is_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = hub(monkeypatch, None)
    monkeypatch.chdir(tmp_path)
    model_source.check_model("some-org/some-model")
    assert seen == ["some-org/some-model"]
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json")
    )
    model_source.check_model("some-org/some-model")
    assert seen == ["some-org/some-model"]
    assert model_source.fetch_config("some-org/some-model") == tmp_path / "config.json"
    for elsewhere in ("s3://bucket/model", "org/on-modelscope"):
        model_source.check_model(elsewhere, environ={"VLLM_USE_MODELSCOPE": "True"})


def test_commands_of_the_recipe_take_a_hub_id_after_a_local_directory(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def download(repo: str, **_: Any) -> str:
        fetched.append(repo)
        return str(world.m)

    hub(monkeypatch, None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(world.d)
    tiny_model.write_tenant(world.m, tmp_path / "p", world.family, 0.7, adapter=False)
    export = ("export", str(tmp_path / "p"), "--family", "f", "--checkpoint")
    for checkpoint, out in (("m", "a"), ("some-org/some-model", "b")):
        assert run_cli(*export, checkpoint, "--out", str(tmp_path / out)) == 0
    assert fetched == ["some-org/some-model"]
    same = (tmp_path / x / "model.safetensors" for x in "ab")
    assert len({file.read_bytes() for file in same}) == 1
    assert run_cli(*export, "./no/such", "--out", str(tmp_path / "c")) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no route"), "the Hub does not respond (OSError: no route)"),
        (None, "HF_HUB_OFFLINE forbids a download"),
    ],
)
def test_a_model_that_is_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception | None, words: str
) -> None:
    seen = hub(monkeypatch, error)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", error is None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="neither a local directory nor") as caught:
        model_source.check_model("some-model")
    assert words in str(caught.value) and len(seen) == (error is not None)


def test_a_model_that_the_hub_does_not_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    hub(monkeypatch, RepositoryNotFoundError("not found", response=response))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    with pytest.raises(MissingFileError, match=r"HF_TOKEN\) \(did you mean 'my-model'\?\)"):
        model_source.check_model("my-modle")


# -- KV cache on CPU -----------------------------------------------------------------------------

GIB = 2**30


def test_the_kv_cache_fits_the_free_memory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    memory = Memory(total=24 * GIB, available=10 * GIB)
    words, note = kv_cache_arguments(VllmArgs(()), {}, tmp_path, memory)
    assert words[0] == "--kv-cache-memory-bytes" and 3 * GIB < int(words[1]) < 4 * GIB
    assert note is not None and "3.9 GiB" in note and "10.0 GiB free" in note
    two = kv_cache_arguments(VllmArgs(("-tp", "2")), {}, tmp_path, memory)
    assert int(two[0][1]) <= int(words[1]) // 2
    hub = kv_cache_arguments(VllmArgs(()), {}, None, memory)
    assert int(hub[0][1]) == 5 * GIB // 2
    none_left = kv_cache_arguments(VllmArgs(()), {}, tmp_path, Memory(4 * GIB, GIB))
    assert int(none_left[0][1]) == 64 * 2**20


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (("--kv-cache-memory-bytes", "5"), {}),
        (("--kv_cache_memory_bytes=5",), {}),
        (("--gpu-memory-utilization", "0.4"), {}),
        ((), {"VLLM_CPU_KVCACHE_SPACE": "2"}),
        (("--config", "{config}"), {}),
    ],
)
def test_the_users_size_of_the_kv_cache_wins(
    tmp_path: Path, flags: Sequence[str], environ: dict[str, str]
) -> None:
    (tmp_path / "vllm.yaml").write_text("gpu-memory-utilization: 0.3\n")
    given = VllmArgs(tuple(flag.format(config=tmp_path / "vllm.yaml") for flag in flags))
    memory = Memory(24 * GIB, 10 * GIB)
    assert kv_cache_arguments(given, environ, tmp_path, memory) == ([], None)


def test_memory_is_that_of_the_node_within_the_containers_limit(tmp_path: Path) -> None:
    for node, free in ((0, 8), (1, 6)):
        folder = tmp_path / "nodes" / f"node{node}"
        folder.mkdir(parents=True)
        folder.joinpath("meminfo").write_text(
            f"Node {node} MemTotal: {16 * 2**20} kB\nNode {node} MemFree: {free * 2**20} kB\n"
            f"Node {node} Active(file): {2**20} kB\n"
        )
    nodes, group = tmp_path / "nodes", tmp_path / "cgroup"
    group.mkdir()
    assert read_memory(nodes, group) == Memory(16 * GIB, 7 * GIB)
    (group / "memory.max").write_text(str(4 * GIB))
    (group / "memory.current").write_text(str(GIB))
    assert read_memory(nodes, group) == Memory(4 * GIB, 3 * GIB)
    (group / "memory.max").write_text("max\n")
    assert read_memory(nodes, group) == Memory(16 * GIB, 7 * GIB)
    assert read_memory(tmp_path / "nothing", group) is None


def test_the_command_sizes_the_kv_cache_on_cpu_only(world: SimpleNamespace) -> None:
    cpu = VllmInstall(package=None, has_command=True, on_cpu=True)
    launch = built(world, vllm=cpu)
    assert "--kv-cache-memory-bytes" in launch.argv and "KV cache: " in launch.notes[0]
    assert "--kv-cache-memory-bytes" not in built(world).argv


# -- address and directories ---------------------------------------------------------------------


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        check_address(("127.0.0.1", port + 1 if port < 65535 else port - 1))
        sock.listen()
        for host in ("127.0.0.1", ""):
            with pytest.raises(ConfigError, match=f"port {port} is in use"):
                check_address((host, port))
    check_address(("127.0.0.1", port))
    check_address(None)


def test_a_dry_run_only_notes_a_port_in_use(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ("serve", str(world.m), "--family", str(world.f), "--host", "127.0.0.1", "--port")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        assert run_cli(*serve, port, "--dry-run") == 0
        assert f"note: port {port} is in use" in capsys.readouterr().err
        assert run_cli(*serve, port) == 1
        assert f"ConfigError: port {port} is in use" in capsys.readouterr().err


def test_an_address_that_is_none_of_ours() -> None:
    for bind in (("192.0.2.1", 8000), ("127.0.0.1", 70000), ("no.such.host.invalid", 8000)):
        with pytest.raises(ConfigError):
            check_address(bind)


def test_directories_must_be_writable(world: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert unwritable(tmp_path / "new" / "deep") is None
    assert "is not a directory" in (unwritable(file / "below") or "")
    config = json.dumps({"safegene": {"staging_dir": str(file / "s")}})
    message = rejected(world, "--download-dir", str(file), "--additional-config", config)
    assert "--download-dir" in message and "safegene.staging_dir" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_the_right_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "is not writable" in (unwritable(tmp_path / "s") or "")


# -- settings file -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("registy: r.sqlite\nstore: s\n", "registy: unknown key (did you mean 'registry'?)"),
        ("registry: r.sqlite\n", "store: Field required"),
        (GOOD + "tenants: {gait: {}}\n", "tenants.gait: unknown key (did you mean 'gate'?)"),
        (GOOD + "keys: [{name: a, scopes: [root], secret_env: K}]\n", "keys.0.scopes.0"),
        (GOOD + "keys: [{name: a, secret_env: NO_SUCH}]\n", "NO_SUCH is empty or not set"),
        (GOOD + "keys: [{name: a, secret_file: gone}]\n", "gone cannot be read"),
        (GOOD + "keys: [{name: a, secret_env: SECRET, tenants: [A B]}]\n", "tenant name 'A B'"),
        (GOOD + "keys: [{name: a, secret_env: SHORT, tenants: [a]}]\n", "32 to 200 visible"),
        (GOOD + "registry_file: url\n", "one of them"),
        ("registry: nowhere/r.sqlite\nstore: s\n", "nowhere is not a directory"),
        ("registry: mysql://h/db\nstore: s\n", "expected sqlite:///FILE or postgresql"),
        ("registry: r.sqlite\nstore: safegene.yaml/s\n", "safegene.yaml is not a directory"),
        (GOOD + "tenants: {directory: nowhere}\n", "tenants.directory cannot be read"),
        (GOOD + "tenants: {gate: {prompts: no.jsonl}}\n", "no.jsonl cannot be read"),
        (GOOD + "probes: {prompts: no.jsonl}\n", "no.jsonl cannot be read"),
        ("registry: [\n", "is no YAML"),
    ],
)
def test_a_bad_settings_file_is_rejected_by_serve_and_dry_run_and_check(
    world: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: str,
) -> None:
    secrets = {"SHORT": "short", "SECRET": "0123456789abcdef" * 4}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    file = tmp_path / "safegene.yaml"
    file.write_text(text)
    message = rejected(world, server_config=file, environ=secrets)
    assert words in message and str(file) in message
    serve = ("serve", str(world.m), "--family", str(world.f), "--server-config", str(file))
    for arguments in ((*serve, "--dry-run"), ("config", "check", str(file))):
        assert run_cli(*arguments) == 1
        reported = capsys.readouterr().err
        assert words in reported or "is not YAML" in reported


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def declared(world: SimpleNamespace, folder: Path) -> Path:
    """A settings file with one tenant that fits, one that is damaged and one of a bad name."""
    (folder / "tenants").mkdir()
    (folder / "tenants" / "acme").symlink_to(world.t)
    for name in ("broken", "UPPER"):
        (folder / "tenants" / name).mkdir()
        (folder / "tenants" / name / "safegene.json").write_text("{")
    file = folder / "safegene.yaml"
    file.write_text(
        f"{GOOD}serve: {{model: {world.m}, family: {world.f}}}\ntenants: {{directory: tenants}}\n"
    )
    return file


def test_damaged_declared_tenants_are_reported_and_the_others_served(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = declared(world, tmp_path)
    launch = built(world, server_config=file)
    warnings = "\n".join(launch.notes)
    assert "tenant 'broken'" in warnings and "UPPER" in warnings and "acme" not in warnings
    assert run_cli("config", "check", str(file)) == 1
    assert "tenant 'broken'" in capsys.readouterr().err
    for name in ("broken", "UPPER"):
        (tmp_path / "tenants" / name / "safegene.json").unlink()
    assert run_cli("config", "check", str(file)) == 0
    assert capsys.readouterr().out == f"{file}: OK\n"


def test_a_file_without_a_serve_part_is_checked_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "safegene.yaml").write_text(GOOD)
    assert run_cli("config", "check", str(tmp_path / "safegene.yaml")) == 0
    assert "model and family are not checked" in capsys.readouterr().out


# -- config init and show ------------------------------------------------------------------------


def test_init_writes_a_file_that_passes_the_check(
    world: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("config", "init", "--model", str(world.m), "--family", str(world.f)) == 0
    text = (tmp_path / "safegene.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=safegene.schema.json\n")
    assert json.loads((tmp_path / "safegene.schema.json").read_text()) == config_schema()
    capsys.readouterr()
    assert run_cli("config", "check") == 1
    assert "SAFEGENE_ADMIN_KEY is empty or not set" in capsys.readouterr().err
    monkeypatch.setenv("SAFEGENE_ADMIN_KEY", "short")
    assert run_cli("config", "check") == 1
    assert "32 to 200 visible ASCII characters" in capsys.readouterr().err
    monkeypatch.setenv("SAFEGENE_ADMIN_KEY", "0123456789abcdef" * 4)
    assert run_cli("config", "check") == 0
    assert run_cli("config", "init") == 1, "an existing file is never replaced"
    assert (tmp_path / "safegene.yaml").read_text() == text


def test_the_schema_rejects_what_the_settings_reject() -> None:
    schema = config_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["serve"]["additionalProperties"] is False
    assert set(schema["properties"]["serve"]["required"]) == {"model", "family"}
    assert {"registry", "store", "keys", "tenants"} <= set(schema["properties"])


SHOWN = """
registry: postgresql://user:hush@db/safegene
store: store
sources: {options: {s3: {secret: hush}}}
serve: {model: m, family: f, slots: 3, vllm: {port: 8000, hf_token: hush}}
"""


def test_show_names_the_origin_of_every_value_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "safegene.yaml"
    file.write_text(SHOWN)
    monkeypatch.setenv("SAFEGENE_SERVER_ACCESS__MAX_BODY_BYTES", "123")
    show = ("config", "show", str(file), "--json", "--port", "9000", "--max-loras", "7")
    assert run_cli(*show) == 0
    out = capsys.readouterr().out
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(out)}
    assert rows["store"] == (str(tmp_path / "store"), "file")
    assert rows["access.max_body_bytes"] == (123, "environment")
    assert rows["tenants.gate.coherent_min"] == (0.9, "default")
    assert rows["serve.slots"] == (3, "file") and rows["serve.apply"] == (None, "default")
    assert rows["serve.vllm.port"] == ("9000", "flag")
    assert rows["serve.vllm.max-loras"] == ("7", "flag")
    assert rows["registry"] == ("postgresql://user:***@db/safegene", "file")
    assert rows["serve.vllm.hf-token"] == ("***", "file")
    assert "hush" not in out
    assert run_cli("config", "show", str(file)) == 0
    table = capsys.readouterr().out
    assert "environment" in table and "hush" not in table
