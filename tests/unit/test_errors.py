"""The error tree: its drawing matches the classes and statuses; several errors are one message."""

from __future__ import annotations

import re

import pytest

from safegene_server.error_responses import status_of
from safegene_vllm import errors
from safegene_vllm.errors import HeaderError, SafegeneError, SiteError, raise_errors


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
    with pytest.raises(HeaderError, match=r"(?s)^9000 errors:.*: 0\n.*: 19\n- and 8980 more$"):
        raise_errors([HeaderError(str(number)) for number in range(9000)])
