"""vLLM's objects for the API process: the server package itself imports nothing of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safegene_vllm.plugin import compat
from safegene_vllm.plugin.compat import check_api_process as check_api_process


def lora_request(name: str, lora_int_id: int, path: Path) -> Any:
    """Return a LoRARequest; a name and an id must never be reused for other content."""
    return compat.resolve("LoRARequest")(name, lora_int_id, str(path))
