"""Command and environment of vLLM for the options of `safegene serve`.

Reads headers of files and starts nothing. A flag the user gave wins over ours; one that contradicts
SafeGene is rejected, naming both.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safegene_vllm.errors import ConfigError, SafegeneError, raise_errors
from safegene_vllm.launcher.artifacts import read_artifacts
from safegene_vllm.launcher.cpu_memory import kv_cache_arguments, read_memory
from safegene_vllm.launcher.lora_args import (
    LORA_FLAGS,
    lora_arguments,
    lora_contradictions,
    module_arguments,
)
from safegene_vllm.launcher.preflight import check_before_start
from safegene_vllm.launcher.vllm_args import (
    ServeOptions,
    VllmArgs,
    absolute,
    additional_config,
    in_config_file,
    lora_modules,
)
from safegene_vllm.launcher.vllm_install import VllmInstall, find_vllm
from safegene_vllm.model_source import local_model
from safegene_vllm.settings import KEY, Settings, parse_settings

KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
KEEP_ALIVE_S = "75"
"""Seconds an idle connection stays open. Many gateways reuse connections for longer than vLLM's
default of 5 s, and then get a reset instead of a response."""
PLUGINS = ("safegene", "safegene_server")
# vLLM only logs a plugin that fails to import; a worker extension that fails stops the worker.
WORKER_EXTENSION = "safegene_vllm.plugin.worker_extension.RequirePlugin"
_FORMER_WORKER_EXTENSION = "safegene_vllm.plugin.required.Required"

_SECRET_FLAGS = ("api-key", "hf-token")
_SECRET_VARIABLES = ("VLLM_API_KEY", "HF_TOKEN")
_OURS = frozenset((*LORA_FLAGS, "additional-config", "lora-modules", "load-format", "model"))
# Address and key of the readiness check; values in --config would be missed.
_ADDRESS = frozenset(("host", "port", "uds", "api-key", "ssl-keyfile", "ssl-certfile"))


@dataclass(frozen=True)
class Launch:
    """Command to run, additions to its environment, and the address of the server."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    uds: str | None = None
    verify_tls: bool = True
    api_key: str | None = field(default=None, repr=False)
    bind: tuple[str, int] | None = None
    """Address that the server will listen on; None for a Unix socket."""
    notes: tuple[str, ...] = ()
    """Lines to print before the start: choices made, and warnings."""
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def shown(self) -> str:
        """Return the command for a shell, with API keys masked."""
        argv, keys = [], False
        for token in self.argv:
            if token.startswith("-"):
                keys = token.replace("_", "-").startswith("--api-key")
                token = f"{token.partition('=')[0]}=***" if keys and "=" in token else token
            elif keys:
                token = "***"
            argv.append(token)
        env = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " \\\n  ".join([*env, shlex.join(argv)])


def build_command(
    options: ServeOptions,
    environ: Mapping[str, str],
    *,
    plugins: Sequence[str] | None = None,
    vllm: VllmInstall | None = None,
) -> Launch:
    """Build the command; `plugins` are the other vLLM plugins (default: all installed).

    Everything that can be checked before vLLM starts is checked here, except the address.

    Errors: ConfigError (settings and flags), FormatError, FamilyMismatchError, BoundsError and
    AdapterRejectedError (files); several are reported together.
    """
    vllm = vllm or find_vllm()
    flags = VllmArgs(tuple(options.vllm_args))
    config = additional_config(flags)
    settings = _settings(options, config, flags)
    user_modules = lora_modules(flags)
    problems = _contradictions(options, flags, settings, user_modules, environ)
    tenants = {**user_modules, **options.tenants}
    artifacts, file_errors = read_artifacts(options.model, settings, tenants)
    found = check_before_start(options, flags, settings, artifacts.header, environ, vllm)
    raise_errors([*problems, *file_errors, *found.errors])
    argv = vllm.command(options.model)
    env: dict[str, str] = {}
    if settings.apply == "weights":
        if not flags.given("load-format"):
            argv += ["--load-format", "safegene"]
    else:
        argv += lora_arguments(options, flags, settings, artifacts)
        flags = flags.without("lora-modules")
        argv += module_arguments(options)
        if options.server_config is not None:
            env["SAFEGENE_SERVER_CONFIG"] = str(absolute(options.server_config))
        elif "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environ:
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if not flags.given("worker-extension-cls"):
        argv += ["--worker-extension-cls", WORKER_EXTENSION]
    config[KEY] = settings.model_dump(mode="json", exclude_defaults=True)
    argv += ["--additional-config", json.dumps(config)]
    notes = list(found.warnings)
    if vllm.on_cpu:
        checkpoint = local_model(options.model, revision=flags.value("revision"))
        size, note = kv_cache_arguments(flags, environ, checkpoint, read_memory())
        argv += size
        notes += [note] if note else []
    # The model is in the command already; `vllm serve` takes it by position only.
    argv += flags.without("additional-config").without("model").tokens
    env["VLLM_PLUGINS"] = _plugins(environ, plugins)
    if KEEP_ALIVE not in environ:
        env[KEEP_ALIVE] = KEEP_ALIVE_S
    return replace(_launch(argv, env, flags, environ), notes=tuple(notes))


def _settings(options: ServeOptions, config: Mapping[str, Any], flags: VllmArgs) -> Settings:
    """Merge our options and the user's own `safegene` key.

    Errors: ConfigError naming both where they differ, and those of parse_settings.
    """
    mine: dict[str, Any] = {
        "family": absolute(options.family),
        "apply": options.apply,
        "base_profile": absolute(options.base_profile),
        "profile": absolute(options.profile),
        "adapter_roots": [absolute(root) for root in options.adapter_roots] or None,
        "missing_profile": options.missing_profile,
    }
    mine = {key: value for key, value in mine.items() if value is not None}
    theirs = config.get(KEY) or {}
    if not isinstance(theirs, Mapping):
        raise ConfigError(
            f"additional-config key `{KEY}` is {type(theirs).__name__}, expected an object."
        )
    conflicts: list[SafegeneError] = [
        ConfigError(
            f"--{key.removesuffix('s').replace('_', '-')} {value!r} contradicts "
            f"--additional-config {KEY}.{key} = {theirs[key]!r}; give one of them."
        )
        for key, value in mine.items()
        if key in theirs and theirs[key] != value
    ]
    raise_errors(conflicts)
    if "family" not in {**theirs, **mine}:
        raise ConfigError("--family is missing: give the directory of the safety vector.")
    merged = {**theirs, **mine}
    load_format = flags.value("load-format") or "auto"
    if merged.get("apply") == "weights" and not flags.given("load-format"):
        load_format = "safegene"
    settings = parse_settings({KEY: merged}, load_format=load_format)
    assert settings is not None
    return settings


def _contradictions(
    options: ServeOptions,
    flags: VllmArgs,
    settings: Settings,
    modules: Mapping[str, Path],
    environ: Mapping[str, str],
) -> list[SafegeneError]:
    """Flags that contradict SafeGene's, each message naming both sides."""
    found: list[str] = []
    if flags.given("model") and flags.value("model") != options.model:
        found.append(f"MODEL {options.model!r} and --model {flags.value('model')!r}: give one")
    if in_file := in_config_file(flags, _OURS | _ADDRESS):
        names = ", ".join(f"--{name}" for name in in_file)
        found.append(
            f"--config {flags.value('config')} sets {names}: give them on the command line"
        )
    if flags.value("worker-extension-cls") == _FORMER_WORKER_EXTENSION:
        found.append(
            f"--worker-extension-cls {_FORMER_WORKER_EXTENSION}: renamed, give {WORKER_EXTENSION} "
            "or leave it out"
        )
    if options.server_config is not None:
        found += _registry_contradictions(options, flags, settings, environ)
    found += _second_servers(flags, environ)
    replicas = flags.number("data-parallel-size") or 1
    if replicas > 1:
        found.append(
            f"--data-parallel-size {replicas}: receipts reach the server from one replica only; "
            "run one server per replica"
        )
    if twice := sorted(set(modules) & set(options.tenants)):
        found.append(f"{', '.join(twice)} in both --tenant and --lora-modules")
    served = flags.values("served-model-name") or [options.model]
    found += [
        f"tenant {name!r} has the name of the base model: choose another, or --served-model-name"
        for name in [*modules, *options.tenants]
        if name in served
    ]
    if settings.apply == "weights":
        lora = [f"--{n}" for n in ("enable-lora", "lora-modules", "max-loras") if flags.given(n)]
        lora += ["--tenant"] if options.tenants else []
        lora += ["--slots"] if options.slots is not None else []
        if lora:
            found.append(
                f"{', '.join(lora)} with --apply weights: weights serve one checkpoint; use "
                "--apply gain for LoRA tenants"
            )
    else:
        found += lora_contradictions(options, flags, settings)
    return [ConfigError(f"{problem}.") for problem in found]


def _second_servers(flags: VllmArgs, environ: Mapping[str, str]) -> list[str]:
    """Servers of the `vllm serve` command that run without SafeGene's routes and access check."""
    found = [
        f"--{name}: that server does not load SafeGene's routes; leave it out"
        for name in ("grpc", "headless", "omni")
        if flags.given(name)
    ]
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        found.append(
            "VLLM_USE_RUST_FRONTEND: that server does not load SafeGene's routes; unset it"
        )
    if (servers := flags.number("api-server-count") or 1) > 1:
        found.append(
            f"--api-server-count {servers}: requests in flight are counted by one process; "
            "leave it out"
        )
    return found


def _registry_contradictions(
    options: ServeOptions, flags: VllmArgs, settings: Settings, environ: Mapping[str, str]
) -> list[str]:
    """Options that contradict a registry."""
    where = f"--server-config {options.server_config}"
    found = []
    if options.server_config is not None and not options.server_config.is_file():
        found.append(f"{where}: no such file")
    if options.tenants or flags.given("lora-modules"):
        found.append(f"--tenant and --lora-modules with {where}: the registry lists the tenants")
    if flags.given("api-key") or environ.get("VLLM_API_KEY"):
        name = "--api-key" if flags.given("api-key") else "VLLM_API_KEY"
        found.append(f"{name} with {where}: keys are in the registry, or named in that file")
    if settings.apply == "weights":
        found.append(f"{where} with --apply weights: weights serve one checkpoint")
    if settings.missing_profile != "refuse":
        found.append(
            f"--missing-profile {settings.missing_profile} with {where}: every revision of a "
            "registry has a profile"
        )
    return found


def _plugins(environ: Mapping[str, str], installed: Sequence[str] | None) -> str:
    """VLLM_PLUGINS: the user's plugins and our two.

    The list filters every group of plugins, so all are named if it is unset. Endpoint plugins
    are the exception: they load only when named, so others stay out.
    """
    if "VLLM_PLUGINS" in environ:
        names = [name for name in environ["VLLM_PLUGINS"].split(",") if name]
    else:
        names = list(installed_plugins() if installed is None else installed)
    return ",".join(dict.fromkeys([*names, *PLUGINS]))


def installed_plugins() -> list[str]:
    """List the installed vLLM plugins that load without being named."""
    points = entry_points()
    groups = [g for g in points.groups if g.startswith("vllm.") and g != "vllm.endpoint_plugins"]
    return sorted({point.name for group in groups for point in points.select(group=group)})


def _launch(
    argv: Sequence[str], env: Mapping[str, str], flags: VllmArgs, environ: Mapping[str, str]
) -> Launch:
    """Add the server's address as seen from this machine."""
    bound, port = flags.value("host") or "", flags.number("port") or 8000
    host = bound or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    tls = flags.given("ssl-keyfile") and flags.given("ssl-certfile")
    shown = f"[{host}]" if ":" in host else host
    return Launch(
        argv=tuple(argv),
        env=env,
        url=f"http{'s' if tls else ''}://{shown}:{port}",
        uds=flags.value("uds"),
        bind=None if flags.given("uds") else (bound, port),
        verify_tls=not _is_loopback(host),
        api_key=flags.value("api-key") or environ.get("VLLM_API_KEY") or None,
        secrets=(
            *(value for name in _SECRET_FLAGS for value in flags.values(name)),
            *(environ.get(name, "") for name in _SECRET_VARIABLES),
        ),
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
