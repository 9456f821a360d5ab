"""The error tree: its drawing matches the classes and statuses; several errors are one message."""

from __future__ import annotations

import re

import pytest

from safegene_server.error_responses import status_of
from safegene_vllm import errors
from safegene_vllm.errors import (
    MAX_CHARS,
    HeaderError,
    SafegeneError,
    SiteError,
    raise_errors,
    shorten,
)


def drawn() -> dict[str, tuple[str, int]]:
    """Parent and HTTP status of each error in the module's docstring."""
    found: dict[str, tuple[str, int]] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│ ├└─]*)(\w+Error)\s+(?:\[(\d+)\])?", line)
        if match:
            depth = len(match[1]) // 4
            parent = parents[depth - 1] if depth else "Exception"
            status = match[3] or found[parent][1]
            found[match[2]] = (parent, int(status))
            parents[depth:] = [match[2]]
    return found


def test_the_tree_in_the_docstring_is_the_tree_in_the_module() -> None:
    real = {
        name: (value.__mro__[1].__name__, status_of(value("x")))
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, SafegeneError)
    }
    assert drawn() == real


def test_no_error_raises_nothing() -> None:
    raise_errors([])


def test_one_error_is_raised_itself() -> None:
    error = SiteError("no lora_B")
    with pytest.raises(SiteError) as caught:
        raise_errors([error])
    assert caught.value is error


def test_several_errors_become_one_of_the_first_class_with_all_messages() -> None:
    with pytest.raises(HeaderError, match=r"(?s)2 errors:.*HeaderError: one.*SiteError: two"):
        raise_errors([HeaderError("one"), SiteError("two")])


def test_of_thousands_of_errors_the_first_are_named() -> None:
    words = [a + b for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]
    with pytest.raises(HeaderError, match=r"(?s)^256 errors:.*: aa\n.*: bd\n- and 236 more$"):
        raise_errors([HeaderError(word) for word in words])


def test_errors_of_one_kind_are_named_three_times_and_counted() -> None:
    alike = [SiteError(f"tensor 'model.layers.{n}.q' has rank {n}") for n in range(400_000)]
    with pytest.raises(HeaderError) as caught:
        raise_errors([HeaderError("r is 0"), *alike, HeaderError("bias")])
    assert str(caught.value).splitlines() == [
        "400002 errors:",
        "- HeaderError: r is 0",
        "- SiteError: tensor 'model.layers.0.q' has rank 0",
        "- SiteError: tensor 'model.layers.1.q' has rank 1",
        "- SiteError: tensor 'model.layers.2.q' has rank 2 (and 399997 more like this)",
        "- HeaderError: bias",
    ]


def test_a_message_has_a_largest_length() -> None:
    with pytest.raises(SiteError) as caught:
        raise_errors([SiteError(chr(97 + n) * 5_000) for n in range(20)])
    assert len(str(caught.value)) <= MAX_CHARS
    assert str(caught.value).endswith(" more characters)")
    assert shorten("x" * MAX_CHARS) == "x" * MAX_CHARS
