"""Public messages of errors: what an API key reads when an error names a path of the server."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from safegene_server.artifacts.layout import store_errors
from safegene_server.artifacts.source import _unreadable, naming_source
from safegene_server.error_responses import (
    HIDDEN,
    EngineDownError,
    names_path,
    public_message,
    set_public_name,
)
from safegene_vllm import errors
from safegene_vllm.errors import (
    AdapterRejectedError,
    BoundsError,
    ConflictError,
    FrozenError,
    NotFoundError,
    RegistryDownError,
    SafegeneError,
    SourceError,
    StoreError,
)

PATH = "/var/lib/safegene/store/revisions/ab-cd"
ALL = [
    EngineDownError,
    *(
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, SafegeneError)
    ),
]
QUOTING = (BoundsError, ConflictError, FrozenError, NotFoundError)


@pytest.mark.parametrize("kind", [one for one in ALL if one not in QUOTING])
@pytest.mark.parametrize(
    "text",
    [
        f"{PATH} cannot be written",
        f"2 errors:\n- HeaderError: {PATH}/safegene.json is no JSON",
        f"cannot open '{PATH}'",
        f"at {PATH}: no such file",
        "the registry at sqlite:////var/lib/registry.db is busy",
        "read ~/.aws/credentials",
    ],
)
def test_an_error_of_any_class_that_names_a_path_is_hidden(
    kind: type[Exception], text: str
) -> None:
    assert public_message(kind(text)) == HIDDEN
    assert public_message(text) == HIDDEN


@pytest.mark.parametrize("kind", ALL)
def test_an_error_of_any_class_without_a_path_is_shown(kind: type[Exception]) -> None:
    text = (
        "acme/support@2: rank 64 of s3://bucket/acme, expected 8 or 16; see https://example.com/x"
    )
    assert public_message(kind(text)) == text


@pytest.mark.parametrize("kind", QUOTING)
def test_errors_that_only_quote_the_request_are_shown(kind: type[SafegeneError]) -> None:
    assert public_message(kind("no tenant '/etc'")) == "no tenant '/etc'"
    assert public_message(kind("in the store", public="given")) == "given"


def test_what_vllm_wraps_around_a_message_is_not_shown() -> None:
    wrapped = f"no rank\nTraceback (most recent call last):\n  File '{PATH}'"
    assert public_message(AdapterRejectedError(wrapped)) == "no rank"


def test_an_adapter_is_named_in_place_of_its_directory() -> None:
    rejected = AdapterRejectedError(f"{PATH}: rank 64, in {PATH}/adapter_config.json")
    set_public_name(rejected, PATH, "acme@2")
    assert str(rejected).count(PATH) == 2
    assert public_message(rejected) == "acme@2: rank 64, in acme@2/adapter_config.json"
    other = AdapterRejectedError(f"{PATH} is a link to /srv/else")
    set_public_name(other, PATH, "acme@2")
    assert public_message(other) == HIDDEN


def test_errors_of_the_store_name_no_path_in_public() -> None:
    with pytest.raises(StoreError) as caught, store_errors(Path(PATH)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), PATH)
    assert PATH in str(caught.value)
    message = public_message(caught.value)
    assert "No space left" in message and not names_path(message)


def test_a_source_is_named_as_given_and_its_driver_s_files_are_not() -> None:
    with pytest.raises(SourceError) as caught, naming_source():
        raise SourceError("source /models/acme is not there")
    assert public_message(caught.value) == "source /models/acme is not there"
    driver = _unreadable("s3://bucket/acme", ValueError("no file /srv/app/.aws/credentials"))
    assert "/srv/app" in str(driver)
    assert public_message(driver).startswith("s3://bucket/acme cannot be read (ValueError);")
    own = RegistryDownError("down")
    with pytest.raises(SafegeneError), naming_source():
        own.public = "busy"
        raise own
    assert public_message(own) == "busy"
