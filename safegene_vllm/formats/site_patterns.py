r"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT does, but in linear time.

PEFT and vLLM run a key as a regular expression, `re.match(rf"(.*\.)?({key})$", site)`, and some
take a backtracking engine forever. A tenant writes them, so here they are parsed by a small grammar
and run as one automaton, from the end of a name to its beginning. Names hold no line break. vLLM is
handed weights with the scaling in them, and never a key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safegene_vllm.errors import HeaderError, raise_errors

MAX_CHARS = 200_000
"""Of all keys: a full name for each of 3,500 sites; a dense model of 126 layers has 882."""
MAX_REPEATS = 3
"""Of one key. For other readers of the file: each one is a power of the name's length to them."""
MAX_STEPS = 4_000_000
"""Of one automaton, for all names it is given: seconds. A thousand full names take 300,000."""
_NODE_STEPS = 20
"""What a set of states costs in addition to its states, in memory too."""

_Test = Callable[[str], bool]
_States = tuple[int, ...]
_Groups = list[list[list[tuple[_Test, str]]]]
"""A row of groups of alternatives, each a row of (test of one character, repeat)."""
_TOKEN = re.compile(
    r"(?P<atom>\\.|\[(?:\\.|[^]\\])*\]|[^][\\|()*+?^${}])(?:(?P<repeat>[*+?])\??)?"
    r"|(?P<mark>\((?:\?:)?|[)|^$])",
    re.DOTALL,
)
_MEMBER = re.compile(r"(\d-\d|[a-z]-[a-z]|[A-Z]-[A-Z])|(\\[dw])|\\?[.-]|\w", re.ASCII)
_KINDS: dict[str, _Test] = {
    ".": lambda char: char != "\n",
    r"\d": str.isdecimal,
    r"\w": lambda char: char.isalnum() or char == "_",
}


@dataclass(eq=False, slots=True)
class _Node:
    """A set of states, and the first keys that end in it: at the start of a name, after a dot."""

    states: _States
    whole: int | None
    part: int | None
    to: dict[str, _Node] = field(default_factory=dict)


class SitePatterns:
    """The keys of `option`, in order. Errors: HeaderError naming the keys, and what to write."""

    def __init__(self, option: str, keys: Iterable[str]) -> None:
        self._option = option
        self._tests: list[_Test] = []
        self._next: list[_States] = []
        self._ends: dict[int, tuple[int, bool]] = {}
        self._nodes: dict[_States, _Node] = {}
        self._steps = 0
        listed, start, errors = tuple(keys), [], []
        if sum(map(len, listed)) > MAX_CHARS:
            raise HeaderError(f"{option}: its keys have over {MAX_CHARS} characters; write fewer")
        for index, key in enumerate(listed):
            try:
                start += [s for branch in _branches(key) for s in self._add(*branch, index)]
            except ValueError as error:
                advice = r"write 'q_proj', '^model\.layers\.3\..*' or 'layers\.(1|2)\.mlp\.\w+'"
                errors.append(HeaderError(f"{option} key {key[:100]!r}: {error}; {advice}"))
        raise_errors(errors)
        self._start = self._node(tuple(start))

    def first(self, site: str) -> int | None:
        """The number of the first key that matches `site`, from 0.

        Errors: HeaderError for keys that take more than MAX_STEPS.
        """
        node, best = self._start, None
        for at in range(len(site), -1, -1):
            if at == 0 or site[at - 1] == ".":
                found = node.whole if at == 0 else node.part
                if found is not None and (best is None or found < best):
                    best = found
            if at == 0 or not node.states:
                break
            node = node.to.get(site[at - 1]) or self._step(node, site[at - 1])
        return best

    def _step(self, node: _Node, char: str) -> _Node:
        passed = [s for s in node.states if s not in self._ends and self._tests[s](char)]
        self._steps += _NODE_STEPS + len(node.states) + sum(len(self._next[s]) for s in passed)
        if self._steps > MAX_STEPS:
            raise HeaderError(
                f"{self._option}: its keys take over {MAX_STEPS} steps to match; write fewer"
            )
        states = sorted({state for s in passed for state in self._next[s]})
        node.to[char] = self._node(tuple(states))
        return node.to[char]

    def _node(self, states: _States) -> _Node:
        if states not in self._nodes:
            ends = [self._ends[s] for s in states if s in self._ends]
            whole = min((index for index, _ in ends), default=None)
            part = min((index for index, anchored in ends if not anchored), default=None)
            self._nodes[states] = _Node(states, whole, part)
        return self._nodes[states]

    def _add(self, groups: _Groups, anchored: bool, index: int) -> _States:
        """Add what is read from the end of `groups` to their beginning; the states it starts in."""
        states = self._state(_KINDS["."], ())
        self._ends[states[0]] = (index, anchored)
        for group in groups:
            before = states
            starts: list[int] = []
            for atoms in group:
                states = before
                for test, repeat in atoms:
                    (state,) = self._state(test, states)
                    if repeat in ("*", "+"):
                        self._next[state] = (state, *states)
                    states = (state, *states) if repeat in ("*", "?") else (state,)
                starts += states
            states = tuple(dict.fromkeys(starts))
        return states

    def _state(self, test: _Test, following: _States) -> _States:
        self._tests.append(test)
        self._next.append(following)
        return (len(self._tests) - 1,)


class Overrides:
    """The values of `option` by site: PEFT's own rule (`get_pattern_key`), the first key decides.

    Errors: HeaderError, as for SitePatterns.
    """

    def __init__(self, option: str, config: Mapping[str, Any], default: Any) -> None:
        self._values: Mapping[str, Any] = config.get(option) or {}
        self._listed = tuple(self._values.values())
        self._patterns = SitePatterns(option, self._values)
        self._default = default

    def at(self, site: str) -> Any:
        """Errors: HeaderError for keys that take too many steps."""
        number = self._patterns.first(site)
        return self._values.get(site, self._default) if number is None else self._listed[number]


def _branches(key: str) -> list[tuple[_Groups, bool]]:
    """The alternatives of a whole key, each with whether `^` begins it. Errors: ValueError."""
    branches: list[tuple[_Groups, bool]] = []
    groups: _Groups = []
    anchored = ended = inside = False
    at = repeats = 0
    while at < len(key):
        token = _TOKEN.match(key, at)
        mark = token and token["mark"]
        if token is None or (ended and mark != "|"):
            raise ValueError(f"{key[at]!r} at {at} is not supported")
        if mark is None:
            repeats += token["repeat"] is not None
            atom = (_test(token["atom"]), token["repeat"] or "")
            groups[-1][-1].append(atom) if inside else groups.append([[atom]])
        elif mark == "|" and inside:
            groups[-1].append([])
        elif mark == "|":
            branches.append((groups, anchored))
            groups, anchored, ended = [], False, False
        elif mark[0] == "(" and not inside:
            groups.append([[]])
            inside = True
        elif mark == ")" and inside and [] not in groups[-1]:
            inside = False
        elif mark == "^" and not (inside or anchored or groups):
            anchored = True
        elif mark == "$" and not inside:
            ended = True
        else:
            raise ValueError(f"{key[at]!r} at {at} is not supported")
        at = token.end()
    if inside or repeats > MAX_REPEATS:
        found = "a '(' that is not closed" if inside else f"{repeats} repeats (*, +, ?)"
        raise ValueError(f"{found}; expected at most {MAX_REPEATS} repeats and closed groups")
    return [*branches, (groups, anchored)]


def _test(atom: str) -> _Test:
    """The test that one character passes. Errors: ValueError."""
    if atom in _KINDS:
        return _KINDS[atom]
    if atom[0] != "[":
        if len(atom) == 2 and atom[1].isalnum():
            raise ValueError(f"{atom!r} is not supported")
        return atom[-1].__eq__
    negated = atom[1] == "^"
    chars: set[str] = set()
    kinds: list[_Test] = []
    at = 1 + negated
    while at < len(atom) - 1 or not (chars or kinds):
        member = _MEMBER.match(atom, at, len(atom) - 1)
        if member is None or (member[0] == "-" and member.end() < len(atom) - 1):
            raise ValueError(f"{atom[:40]!r} is not supported")
        if member[2]:
            kinds.append(_KINDS[member[2]])
        elif member[1]:
            chars.update(map(chr, range(ord(member[1][0]), ord(member[1][2]) + 1)))
            if member[1][0] > member[1][2]:
                raise ValueError(f"{atom[:40]!r} is not supported")
        else:
            chars.add(member[0][-1])
        at = member.end()
    return lambda char: (char in chars or any(kind(char) for kind in kinds)) is not negated
