"""Methods a worker gains for `collective_rpc`: may this tenant come in, what is really applied?

For the API process and for operators' tools. Answers are plain, because they cross process
boundaries, and a refusal is an answer: vLLM's multiprocess executor leaves the other ranks' replies
unread when one rank raises, and every later answer is then one call old.
"""

from __future__ import annotations

import logging
from typing import Any

from safegene_vllm.errors import SafegeneError
from safegene_vllm.plugin import host

logger = logging.getLogger("vllm.safegene")


def safegene_receipt(self: Any) -> dict[str, Any] | None:
    """This worker's Receipt as a dictionary, or None in an engine without a `safegene` key."""
    rank, world_size = self.rank, self.parallel_config.world_size
    manager = getattr(self.model_runner, "lora_manager", None)
    guest = getattr(manager, "safegene", None)
    if guest is not None:
        receipt: dict[str, Any] = guest.receipt(rank, world_size).to_dict()
        return receipt
    merged = getattr(self.model_runner.get_model(), "safegene_merged", None)
    return None if merged is None else merged.receipt(rank, world_size).to_dict()


def safegene_admit(
    self: Any, lora_name: str, lora_int_id: int, lora_path: str, load_inplace: bool
) -> str | None:
    """Stage and validate a tenant, so that loading it later cannot fail on its files.

    Returns why it is refused, or None. In place: an admitted tenant is remembered until the adapter
    is removed (`remove_lora`). Never raises.
    """
    guest = getattr(getattr(self.model_runner, "lora_manager", None), "safegene", None)
    if guest is None:
        return None
    try:
        guest.admit(
            host.resolve("LoRARequest")(
                lora_name, lora_int_id, lora_path, load_inplace=load_inplace
            )
        )
    except SafegeneError as error:
        return str(error)
    except Exception as error:
        logger.exception("tenant %r could not be read", lora_name)
        return f"{type(error).__name__}: {error}"
    return None
