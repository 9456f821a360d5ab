"""Server settings: `safegene.yaml`, named by the environment variable SAFEGENE_SERVER_CONFIG.

The environment overrides single keys, such as SAFEGENE_SERVER_ACCESS__MAX_BODY_BYTES. A server
without the file serves the tenants of its command line. Secrets are named (a file, an environment
variable), not written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from safegene_server.access.middleware import AccessSettings
from safegene_server.artifacts import Limits, SourceRules
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.probes.settings import ProbeSettings
from safegene_server.tenants.settings import TenantSettings
from safegene_vllm.errors import ConfigError, did_you_mean
from safegene_vllm.formats.yaml_file import load_yaml

ENV = "SAFEGENE_SERVER_CONFIG"
PATHS = (
    ("store",),
    ("registry_file",),
    ("sources", "roots"),
    ("tenants", "directory"),
    ("tenants", "gate", "prompts"),
    ("probes", "prompts"),
)
"""Key paths of the settings that are files or directories."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sources(_Part):
    """Allowed sources of tenants' adapters."""

    roots: tuple[Path, ...] = Field((), description="local sources lie below these")
    protocols: tuple[str, ...] | None = Field(None, description="URL schemes; default: all remote")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="fsspec storage options by protocol"
    )
    max_weights_bytes: int = Field(Limits.weights_bytes, gt=0)
    timeout_s: float = Field(Limits.timeout_s, gt=0)


class Access(_Part):
    """Paths that need no key, and the maximum size of a request."""

    public: tuple[str, ...] = Field(
        ("/health", "/ping", "/v1/safegene/ready"), description="paths whose GET needs no key"
    )
    max_body_bytes: int = Field(16 * 2**20, gt=0)
    response_model: Literal["requested", "revision"] = Field(
        "requested", description="name in a response's `model`; the revision is in a header too"
    )


class Usage(_Part):
    """Usage by day, tenant and key in the registry."""

    keep_days: int = Field(
        400, ge=1, le=36500, description="days, today included; rows of older ones are deleted"
    )


class FirstKey(_Part):
    """Key added at the first start; its secret comes from the environment or a file."""

    name: str
    secret_env: str | None = None
    secret_file: Path | None = None
    scopes: tuple[Literal["admin", "read", "serve"], ...] = ("serve",)
    tenants: tuple[str, ...] = ()
    default_tenant: str | None = None

    def secret(self, environ: Mapping[str, str]) -> str:
        """Read the secret. Errors: ConfigError."""
        if (self.secret_env is None) == (self.secret_file is None):
            raise ConfigError(f"key {self.name!r}: give secret_env or secret_file, one of them.")
        if self.secret_env is not None:
            secret = environ.get(self.secret_env, "")
            where = f"the environment variable {self.secret_env}"
        else:
            where = str(self.secret_file)
            try:
                secret = Path(where).read_text()
            except OSError as error:
                raise ConfigError(f"key {self.name!r}: {where} cannot be read: {error}") from error
        if not secret.strip():
            raise ConfigError(f"key {self.name!r}: {where} is empty or not set.")
        return secret.strip()


class ServerSettings(BaseSettings):
    """Settings of one server. Unknown keys are rejected; the environment overrides the file."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="SAFEGENE_SERVER_", env_nested_delimiter="__"
    )

    registry: str | None = Field(None, description="database URL, or the path of an SQLite file")
    registry_file: Path | None = Field(
        None, description="file that holds the URL, for one with a password"
    )
    store: Path = Field(description="directory of this machine's copies of adapters")
    sources: Sources = Sources()
    access: Access = Access()
    keys: tuple[FirstKey, ...] = ()
    serve: dict[str, Any] | None = Field(
        None, description="model, family and flags: read by `safegene serve`, not by the server"
    )
    tenants: TenantSettings = Field(
        TenantSettings(), description="smoke test, calibration, and how jobs are run"
    )
    metrics: MetricsSettings = Field(
        MetricsSettings(), description="tenants with series of their own, and the update interval"
    )

    probes: ProbeSettings = Field(
        ProbeSettings(), description="whether, how often and with which prompts tenants are probed"
    )
    usage: Usage = Field(
        Usage(), description="requests and tokens by day, tenant and key in the registry"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    def registry_url(self) -> str:
        """Return the database URL. Errors: ConfigError."""
        if (self.registry is None) == (self.registry_file is None):
            raise ConfigError("give `registry` or `registry_file`, one of them.")
        if self.registry is not None:
            return self.registry
        try:
            return Path(self.registry_file or "").read_text().strip()
        except OSError as error:
            raise ConfigError(f"registry_file cannot be read: {error}") from error

    def source_rules(self) -> SourceRules:
        """Return the store's rules for sources. Errors: those of SourceRules."""
        roots = self.sources.roots
        if roots and self.tenants.directory is not None:
            roots = (*roots, self.tenants.directory)
        given: dict[str, Any] = {"roots": roots, "options": self.sources.options}
        if self.sources.protocols is not None:
            given["protocols"] = self.sources.protocols
        return SourceRules(**given)

    def limits(self) -> Limits:
        """Return the store's limits on a fetch."""
        return Limits(
            weights_bytes=self.sources.max_weights_bytes, timeout_s=self.sources.timeout_s
        )

    def access_settings(self, *, usage_forced: bool = False) -> AccessSettings:
        """Return the settings of the access check. Errors: ConfigError."""
        return AccessSettings(
            public=frozenset(self.access.public),
            max_body_bytes=self.access.max_body_bytes,
            usage_forced=usage_forced,
            response_model=self.access.response_model,
        )


def read_settings(environ: Mapping[str, str] = os.environ) -> ServerSettings | None:
    """Read the settings file that the environment names; None if it names none.

    Errors: ConfigError naming the file, every bad key and what is expected; no secrets.
    """
    given = environ.get(ENV)
    if not given:
        return None
    path = Path(given)
    try:
        raw = load_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{ENV}={given}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {_yaml_problem(error)}.") from None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected keys such as `registry:`.")
    try:
        return ServerSettings(**_resolve_paths(path.parent, dict(raw)))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_problems(error)}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


class _Metrics(BaseSettings):
    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, env_prefix="SAFEGENE_SERVER_", env_nested_delimiter="__"
    )

    metrics: MetricsSettings = MetricsSettings()


def metrics_from_environment() -> MetricsSettings:
    """Read the metrics settings of a server without a file (SAFEGENE_SERVER_METRICS__...).

    Errors: ConfigError.
    """
    try:
        return _Metrics().metrics
    except ValidationError as error:
        raise ConfigError(f"SAFEGENE_SERVER_METRICS: {_problems(error)}.") from None


def _problems(error: ValidationError) -> str:
    """List every bad key and what is expected. Only numbers are shown: a text may be a secret."""
    problems = []
    for one in error.errors():
        value = one.get("input")
        shown = isinstance(value, int | float) and one["type"] != "extra_forbidden"
        found = f" = {value!r}" if shown else ""
        message = one["msg"]
        if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown key" + did_you_mean(str(one["loc"][-1]), _known_keys())
        problems.append(f"{'.'.join(map(str, one['loc']))}{found}: {message}")
    return "; ".join(problems)


@cache
def _known_keys() -> frozenset[str]:
    """Names of all keys at any depth."""
    schema = ServerSettings.model_json_schema()
    nodes = (schema, *schema.get("$defs", {}).values())
    return frozenset(name for node in nodes for name in node.get("properties", {}))


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Describe a YAML error without the line itself, which may hold a password."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}: "
    return where + (getattr(error, "problem", None) or type(error).__name__)


def _resolve_paths(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Resolve relative paths against the file's own folder, in place."""
    for *sections, key in PATHS:
        part: Any = raw
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict) and key in part:
            part[key] = _absolute(folder, part[key])
    keys = raw.get("keys")
    for given in keys if isinstance(keys, list) else []:
        if isinstance(given, dict) and isinstance(given.get("secret_file"), str):
            given["secret_file"] = _absolute(folder, given["secret_file"])
    registry = raw.get("registry")
    if isinstance(registry, str) and "://" not in registry:
        raw["registry"] = str(folder / registry)
    return raw


def _absolute(folder: Path, value: Any) -> Any:
    """Resolve paths; other types are left for the settings to reject."""
    if isinstance(value, list):
        return [_absolute(folder, one) for one in value]
    return str(folder.absolute() / value) if isinstance(value, str) else value
