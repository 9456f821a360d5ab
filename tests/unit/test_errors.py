"""The error tree: what is drawn is what is there, and several faults are reported together."""

from __future__ import annotations

import re

import pytest

from safegene_vllm import errors
from safegene_vllm.errors import HeaderError, SafegeneError, SiteError, raise_errors


def test_the_tree_in_the_docstring_is_the_tree_in_the_module() -> None:
    drawn: dict[str, str] = {}
    parents = ["SafegeneError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│ ├└─]*)(\w+Error)\s", line)
        if match:
            depth = len(match[1]) // 4
            drawn[match[2]] = parents[depth - 1]
            parents[depth:] = [match[2]]
    real = {
        name: value.__mro__[1].__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, SafegeneError) and name != "SafegeneError"
    }
    assert drawn == real


def test_no_fault_raises_nothing() -> None:
    raise_errors([])


def test_one_fault_is_raised_as_it_is() -> None:
    fault = SiteError("half a pair")
    with pytest.raises(SiteError) as caught:
        raise_errors([fault])
    assert caught.value is fault


def test_several_faults_become_one_error_of_the_first_class_that_tells_them_all() -> None:
    with pytest.raises(HeaderError, match=r"(?s)2 faults:.*HeaderError: one.*SiteError: two"):
        raise_errors([HeaderError("one"), SiteError("two")])


def test_of_thousands_of_errors_the_first_are_named() -> None:
    with pytest.raises(HeaderError, match=r"(?s)^9000 faults:.*: 0\n.*: 19\n- and 8980 more$"):
        raise_errors([HeaderError(str(number)) for number in range(9000)])
