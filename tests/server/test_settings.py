"""safegene.yaml: the documented one is read, the environment has precedence, bad ones are named."""

from __future__ import annotations

import re
from pathlib import Path
from traceback import format_exception
from types import SimpleNamespace

import pytest

from safegene_server.access.catalog import key_digest
from safegene_server.app import add_first_keys, check_vllm_args
from safegene_server.registry import Registry
from safegene_server.settings import ENV, FirstKey, ServerSettings, read_settings
from safegene_vllm.errors import ConfigError
from safegene_vllm.launcher import read_config_file

ROOT = Path(__file__).parents[2]
LEAST = "registry: r.sqlite\nstore: store\n"


def settings(folder: Path, text: str) -> ServerSettings:
    path = folder / "safegene.yaml"
    path.write_text(text)
    found = read_settings({ENV: str(path)})
    assert found is not None
    return found


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guides" / "tenants.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    found = settings(tmp_path, example)
    assert found.registry_url() == str(tmp_path / "registry.sqlite")
    assert [key.name for key in found.keys] == ["admin", "acme-app"]
    assert found.source_rules().roots == (Path("/srv/adapters"), tmp_path / "tenants")
    assert found.tenants.directory == tmp_path / "tenants"
    (tmp_path / "model").mkdir()
    declared = read_config_file(tmp_path / "safegene.yaml")
    assert (declared.model, declared.family) == (str(tmp_path / "model"), tmp_path / "family")
    assert declared.flags() == ("--max-lora-rank", "16", "--port", "8000")
    assert "/v1/safegene/ready" in found.access_settings().public
    assert found.tenants.gate.harmful_min_refused == 0.75


def test_without_a_file_there_are_none() -> None:
    assert read_settings({}) is None


def test_the_environment_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEGENE_SERVER_STORE", "/elsewhere")
    monkeypatch.setenv("SAFEGENE_SERVER_ACCESS__MAX_BODY_BYTES", "123")
    found = settings(tmp_path, LEAST)
    assert found.store == Path("/elsewhere")
    assert found.access_settings().max_body_bytes == 123


def test_a_url_with_a_password_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:secret@db/safegene\n")
    found = settings(tmp_path, "registry_file: url\nstore: store\n")
    assert found.registry_url() == "postgresql://u:secret@db/safegene"
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST + "color: red\n", "color"),
        (LEAST + "access: {open: true}\n", r"access\.open"),
        (LEAST + "tenants: {gate: {harmful_min_refused: 2}}\n", "harmful_min_refused"),
        (LEAST + "tenants: {gait: {}}\n", "gait"),
        (LEAST + "keys: [{name: a, scopes: [root]}]\n", "scopes"),
        ("registry: r.sqlite\n", "store"),
        ("- a list\n", "expected keys"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_a_bad_file_is_named_with_its_problem(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        settings(tmp_path, text)
    assert str(tmp_path / "safegene.yaml") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "registy: postgresql://u:hush@h/db\nstore: s\n",
        "registry: {url: postgresql://u:hush@h/db}\nstore: s\n",
        "registry: [postgresql://u:hush@h/db]\nstore: s\n",
        LEAST + "keys: [{name: a, secret: hush}]\n",
        LEAST + "keys: hush\n",
        "store: s\nregistry: postgresql://u:hush@h/db: x\n",
        'store: s\nregistry: "postgresql://u:\\hush@h"\n',
    ],
)
def test_no_error_shows_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, text)
    assert "hush" not in "".join(format_exception(caught.value))


def test_a_number_that_will_not_do_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"access\.max_body_bytes = 0: .* greater than 0"):
        settings(tmp_path, LEAST + "access: {max_body_bytes: 0}\n")
    with pytest.raises(ConfigError, match="is no YAML: line 3: mapping values"):
        settings(tmp_path, LEAST + "access: a: b\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST + "access: {}\nkeys: []\naccess: {}\n", "line 5: the key access occurs twice"),
        (LEAST + "access: {public: [], public: [/x]}\n", "line 3: the key public occurs twice"),
        (LEAST + "a:hush@h: 1\na:hush@h: 2\n", "line 4: the key on this line occurs twice"),
    ],
)
def test_a_key_that_occurs_twice_is_rejected(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        settings(tmp_path, text)
    assert "hush" not in str(caught.value)
    merged = "x_base: &base {public: []}\n"
    with pytest.raises(ConfigError, match="x_base"):
        settings(tmp_path, LEAST + merged + "access: {<<: *base, max_body_bytes: 5}\n")


def test_one_registry_is_named(tmp_path: Path) -> None:
    for text in ("store: s\n", LEAST + "registry_file: url\n"):
        with pytest.raises(ConfigError, match="one of them"):
            settings(tmp_path, text).registry_url()
    with pytest.raises(ConfigError, match="cannot be read"):
        settings(tmp_path, "registry_file: nowhere\nstore: s\n").registry_url()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (FirstKey(name="a"), "one of them"),
        (FirstKey(name="a", secret_env="A_KEY"), "A_KEY is empty or not set"),
        (FirstKey(name="a", secret_file=Path("/nowhere")), "/nowhere cannot be read"),
    ],
)
def test_a_key_without_a_secret_stops_the_start(key: FirstKey, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        key.secret({})


def test_first_keys_are_added_once_and_rotated_with_their_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = LEAST + "keys: [{name: admin, secret_env: A_KEY, scopes: [admin], tenants: ['*']}]\n"
    found = settings(tmp_path, text)
    registry = Registry(tmp_path / "r.sqlite")
    for secret in ("sg-" + "a" * 40, "sg-" + "a" * 40, "sg-" + "b" * 40):
        monkeypatch.setenv("A_KEY", secret)
        add_first_keys(registry, found)
        assert registry.keys.get("admin").hash == key_digest(secret).hex()
    actions = [entry.action for entry in registry.audit.page(target="admin").entries]
    assert actions == ["key.rotate", "key.add"]
    registry.close()


@pytest.mark.parametrize("taken", ["rotated", "revoked"])
def test_a_revoked_secret_is_not_restored_at_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    taken: str,
) -> None:
    text = LEAST + "keys: [{name: prometheus, secret_env: A_KEY, scopes: [read], tenants: ['*']}]\n"
    found = settings(tmp_path, text)
    registry = Registry(tmp_path / "r.sqlite")
    for secret in ("sg-" + "a" * 40, "sg-" + "b" * 40):
        monkeypatch.setenv("A_KEY", secret)
        add_first_keys(registry, found)
    if taken == "rotated":
        registry.keys.rotate("prometheus", actor="ops")
    else:
        registry.keys.revoke("prometheus", actor="ops")
    before = registry.keys.get("prometheus")
    for secret in ("sg-" + "b" * 40, "sg-" + "c" * 40):
        monkeypatch.setenv("A_KEY", secret)
        add_first_keys(registry, found)
        assert registry.keys.get("prometheus") == before
        assert "prometheus" in caplog.text and "over HTTP" in caplog.text
        caplog.clear()
    registry.close()


def test_the_file_of_a_secret_is_counted_from_the_settings_file(tmp_path: Path) -> None:
    found = settings(tmp_path, LEAST + "keys: [{name: a, secret_file: secrets/a}]\n")
    assert found.keys[0].secret_file == tmp_path / "secrets" / "a"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"api_key": ["k"]}, "--api-key"),
        ({"lora_modules": ["m"]}, "--lora-modules"),
        ({"api_server_count": 2}, "--api-server-count"),
    ],
)
def test_options_that_bypass_the_registry_are_rejected(
    given: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    check_vllm_args(SimpleNamespace(api_key=None, lora_modules=None, api_server_count=1))
    with pytest.raises(ConfigError, match=words):
        check_vllm_args(SimpleNamespace(**given))
