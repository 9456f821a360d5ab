"""YAML of settings, in which no key may occur twice. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """Rejects what YAML's own loader takes: of two equal keys it drops the first, unseen."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = None if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key is not None and key in seen:
                # Of a line that is not what it was meant to be, the key may be a password.
                shown = key if re.fullmatch(r"[\w.-]{1,100}", str(key)) else "on this line"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown} occurs twice; keep one", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


def load_yaml(text: str) -> Any:
    """Parse one YAML document into plain values. Errors: yaml.YAMLError, also for a key twice."""
    return yaml.load(text, Loader=_UniqueKeys)
