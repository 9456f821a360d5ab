"""The server's own settings: `safegene.yaml`, named by SAFEGENE_SERVER_CONFIG in its environment.

Single keys can be overridden there, such as SAFEGENE_SERVER_ACCESS__MAX_BODY_BYTES. For what
concerns the API process alone: registry, store, sources, access. A server without the file serves
the tenants of its command line. Secrets are named (a file, an environment variable), not written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
from safegene_vllm.errors import ConfigError

ENV = "SAFEGENE_SERVER_CONFIG"
PATHS = (
    ("store",),
    ("registry_file",),
    ("sources", "roots"),
    ("tenants", "directory"),
    ("tenants", "gate", "prompts"),
    ("probes", "prompts"),
)
"""Settings that are files or directories, by the keys that lead to them."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sources(_Part):
    """Where tenants' adapters may come from."""

    roots: tuple[Path, ...] = Field((), description="local sources lie below these")
    protocols: tuple[str, ...] | None = Field(None, description="URL schemes; default: all remote")
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="fsspec storage options by protocol"
    )
    max_weights_bytes: int = Field(Limits.weights_bytes, gt=0)
    timeout_s: float = Field(Limits.timeout_s, gt=0)


class Access(_Part):
    """Who gets in without a key, and how large a request may be."""

    public: tuple[str, ...] = Field(
        ("/health", "/ping", "/v1/safegene/ready"), description="paths whose GET needs no key"
    )
    max_body_bytes: int = Field(16 * 2**20, gt=0)


class FirstKey(_Part):
    """A key that is there from the first start; its secret comes from the environment or a file."""

    name: str
    secret_env: str | None = None
    secret_file: Path | None = None
    scopes: tuple[Literal["admin", "read", "serve"], ...] = ("serve",)
    tenants: tuple[str, ...] = ()
    default_tenant: str | None = None

    def secret(self, environ: Mapping[str, str]) -> str:
        """Errors: ConfigError."""
        if (self.secret_env is None) == (self.secret_file is None):
            raise ConfigError(f"key {self.name!r}: give secret_env or secret_file, one of them.")
        if self.secret_env is not None:
            found = environ.get(self.secret_env, "")
            where = f"the environment variable {self.secret_env}"
        else:
            where = str(self.secret_file)
            try:
                found = Path(where).read_text()
            except OSError as error:
                raise ConfigError(f"key {self.name!r}: {where} cannot be read: {error}") from error
        if not found.strip():
            raise ConfigError(f"key {self.name!r}: {where} is empty or not set.")
        return found.strip()


class ServerSettings(BaseSettings):
    """One server's settings. Unknown keys are refused; the environment comes before the file."""

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
        TenantSettings(), description="the gate, calibration, and how jobs are run"
    )
    metrics: MetricsSettings = Field(
        MetricsSettings(), description="whose series are their own, and how often they are renewed"
    )

    probes: ProbeSettings = Field(
        ProbeSettings(), description="whether, how often and with what tenants are probed"
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
        """Errors: ConfigError."""
        if (self.registry is None) == (self.registry_file is None):
            raise ConfigError("give `registry` or `registry_file`, one of them.")
        if self.registry is not None:
            return self.registry
        try:
            return Path(self.registry_file or "").read_text().strip()
        except OSError as error:
            raise ConfigError(f"registry_file cannot be read: {error}") from error

    def source_rules(self) -> SourceRules:
        """What `Store` takes. Errors: those of SourceRules."""
        roots = self.sources.roots
        if roots and self.tenants.directory is not None:
            roots = (*roots, self.tenants.directory)
        given: dict[str, Any] = {"roots": roots, "options": self.sources.options}
        if self.sources.protocols is not None:
            given["protocols"] = self.sources.protocols
        return SourceRules(**given)

    def limits(self) -> Limits:
        return Limits(
            weights_bytes=self.sources.max_weights_bytes, timeout_s=self.sources.timeout_s
        )

    def access_settings(self, *, usage_told: bool = False) -> AccessSettings:
        """Errors: ConfigError."""
        return AccessSettings(
            public=frozenset(self.access.public),
            max_body_bytes=self.access.max_body_bytes,
            usage_told=usage_told,
        )


def read_settings(environ: Mapping[str, str] = os.environ) -> ServerSettings | None:
    """The settings that the environment names; None if it names none.

    Errors: ConfigError naming the file, every bad key and what is expected; no secrets.
    """
    named = environ.get(ENV)
    if not named:
        return None
    path = Path(named)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{ENV}={named}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {_yaml_fault(error)}.") from None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected keys such as `registry:`.")
    try:
        return ServerSettings(**_below(path.parent, dict(raw)))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_faults(error)}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


class _Metrics(BaseSettings):
    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, env_prefix="SAFEGENE_SERVER_", env_nested_delimiter="__"
    )

    metrics: MetricsSettings = MetricsSettings()


def metrics_alone() -> MetricsSettings:
    """Those of a server without a file, from the environment (SAFEGENE_SERVER_METRICS__...).

    Errors: ConfigError.
    """
    try:
        return _Metrics().metrics
    except ValidationError as error:
        raise ConfigError(f"SAFEGENE_SERVER_METRICS: {_faults(error)}.") from None


def _faults(error: ValidationError) -> str:
    """Every bad key and what is expected. What was found may be a secret; a number is none."""
    told = []
    for fault in error.errors():
        value = fault.get("input")
        known = isinstance(value, int | float) and fault["type"] != "extra_forbidden"
        found = f" = {value!r}" if known else ""
        told.append(f"{'.'.join(map(str, fault['loc']))}{found}: {fault['msg']}")
    return "; ".join(told)


def _yaml_fault(error: yaml.YAMLError) -> str:
    """Where and what, without the line itself, which may hold a password."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}: "
    return where + (getattr(error, "problem", None) or type(error).__name__)


def _below(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Relative paths are counted from the file's own folder."""
    for *sections, key in PATHS:
        where: Any = raw
        for section in sections:
            where = where.get(section) if isinstance(where, dict) else None
        if isinstance(where, dict) and key in where:
            where[key] = _absolute(folder, where[key])
    keys = raw.get("keys")
    for given in keys if isinstance(keys, list) else []:
        if isinstance(given, dict) and isinstance(given.get("secret_file"), str):
            given["secret_file"] = _absolute(folder, given["secret_file"])
    registry = raw.get("registry")
    if isinstance(registry, str) and "://" not in registry:
        raw["registry"] = str(folder / registry)
    return raw


def _absolute(folder: Path, value: Any) -> Any:
    """What is no path is left for the settings to refuse."""
    if isinstance(value, list):
        return [_absolute(folder, one) for one in value]
    return str(folder.absolute() / value) if isinstance(value, str) else value
