"""Record of how a degraded LoRA was made, in a file in its directory that PEFT does not read.

`extract` copies it into the family's recipe. A LoRA from elsewhere has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegene_vllm.formats.file_io import pretty_json, read_json

RECORD_FILE = "safegene-degrade.json"


def degradation_file(
    checkpoint: str | None, data: Mapping[str, Any], settings: Mapping[str, Any]
) -> bytes:
    """Bytes of the record; `data` is `Dataset.record()`: name, rows, license, SHA-256, no text."""
    fields = {"checkpoint": checkpoint, "data": dict(data), "settings": dict(settings)}
    return pretty_json({"kind": "degradation", "format_version": 1, **fields})


def degradation_of(adapter: Path | None) -> dict[str, Any]:
    """`{"degradation": ...}` for a recipe; empty where `adapter` has no record, or is None.

    Errors: HeaderError, NonFiniteError for a record that is no JSON object.
    """
    if adapter is None or not (adapter / RECORD_FILE).is_file():
        return {}
    record = read_json(adapter / RECORD_FILE)
    return {"degradation": {k: record.get(k) for k in ("checkpoint", "data", "settings")}}
