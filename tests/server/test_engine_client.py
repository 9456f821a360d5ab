"""Loading through the engine client: polling for a long read, and the names in its errors."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safegene_server import engine_client
from safegene_server.engine_client import BACK_OFF, MAX_POLL_S, POLL_S, EngineClient
from safegene_server.error_responses import public_message
from safegene_vllm.errors import AdapterRejectedError
from safegene_vllm.formats.adapter import WEIGHTS_FILE


def client_of(collective_rpc: Any) -> EngineClient:
    settings = SimpleNamespace(adapter_roots=(), apply="composed")
    verifier: Any = SimpleNamespace(
        plan=SimpleNamespace(settings=settings),
        published=lambda number: True,
        verify=lambda request, receipts, profile: None,
    )
    return EngineClient(SimpleNamespace(collective_rpc=collective_rpc), verifier)


def request_of(path: Path) -> Any:
    return SimpleNamespace(
        lora_name="acme@2", lora_int_id=2, lora_path=str(path), load_inplace=False
    )


def test_a_rejection_of_the_workers_names_the_adapter_in_public(tmp_path: Path) -> None:
    async def collective_rpc(method: str, args: object) -> Any:
        return [{"rejected": f"{tmp_path}/adapter_config.json: rank 64", "receipt": None}]

    with pytest.raises(AdapterRejectedError, match=re.escape(str(tmp_path))) as caught:
        asyncio.run(client_of(collective_rpc).add(request_of(tmp_path)))
    assert public_message(caught.value) == "acme@2/adapter_config.json: rank 64"


def test_a_long_read_is_polled_with_back_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WEIGHTS_FILE).touch()
    ready, pauses, real = 20, [0.0][1:], asyncio.sleep

    async def collective_rpc(method: str, args: object) -> Any:
        if method == "safegene_begin":
            return [len(pauses) >= ready, True]
        return [{"rejected": None, "receipt": {}}]

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        await real(0)

    monkeypatch.setattr(engine_client.asyncio, "sleep", sleep)
    asyncio.run(client_of(collective_rpc).add(request_of(tmp_path)))
    assert len(pauses) == ready and pauses[0] == POLL_S and pauses[-1] == MAX_POLL_S
    assert all(
        later == min(sooner * BACK_OFF, MAX_POLL_S) for sooner, later in itertools.pairwise(pauses)
    )
