"""The host's request for one adapter: what the API process gives the engine to load and to serve.

For the server, which knows nothing of vLLM and chooses the id itself. Not for loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safegene_vllm.plugin import compat


def lora_request(name: str, lora_int_id: int, path: Path) -> Any:
    """A LoRARequest; `name` and `lora_int_id` must be one revision's for good."""
    return compat.resolve("LoRARequest")(name, lora_int_id, str(path))
