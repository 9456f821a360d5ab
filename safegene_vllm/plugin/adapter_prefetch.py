"""Tenants on their way in: read and checked in a thread, so that the engine's steps go on.

For a worker's guest, which takes them over in the engine's own thread and gives them a slot there.
Nothing here can be served: a tenant that is never taken over is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_vllm.formats.adapter import Adapter, load_adapter
from safegene_vllm.plugin.validation import Tenant

PATIENCE_S = 60.0
"""How long what has been read waits for whoever asked for it."""

Admitted = tuple[Tenant, Adapter | None]
"""A tenant, and its adapter if that has just been read."""
_Key = tuple[int, str, str]


@dataclass
class _Begun:
    """`asked_s` is when anybody last wanted to know of it."""

    reading: Future[Admitted]
    asked_s: float


class AdapterPrefetcher:
    """`admit` reads and checks; `discard` removes the staged copy of a tenant nobody came for."""

    def __init__(self, admit: Callable[[Any], Admitted], discard: Callable[[Path], None]) -> None:
        self._admit, self._discard = admit, discard
        self._thread = ThreadPoolExecutor(1, "safegene-admit")
        self._begun: dict[_Key, _Begun] = {}
        self._read: tuple[Path, Adapter] | None = None

    def begin(self, request: Any) -> bool:
        """Start to read a tenant unless that has begun; whether it has ended, well or not."""
        now, key = time.monotonic(), _key(request)
        for other, begun in list(self._begun.items()):
            if begun.reading.done() and now - begun.asked_s > PATIENCE_S:
                self._forget(other)
        found = self._begun.get(key)
        if found is None:
            found = self._begun[key] = _Begun(self._thread.submit(self._admit, request), now)
        found.asked_s = now
        return found.reading.done()

    def tenant(self, request: Any) -> Tenant:
        """What has been begun, waited for if need be, or else is read here and now.

        Its adapter is kept for `adapter` until `drop`. Errors: those of admission.
        """
        begun = self._begun.pop(_key(request), None)
        self.drop()
        tenant, adapter = self._admit(request) if begun is None else begun.reading.result()
        self._read = None if adapter is None else (tenant.staged, adapter)
        return tenant

    def adapter(self, tenant: Tenant) -> Adapter | None:
        """The tenant's own adapter, once; from its staged copy where another or none was kept.
        None for a profile alone. Errors: those of `load_adapter`."""
        read, self._read = self._read, None
        if read is not None and read[0] == tenant.staged:
            return read[1]
        return load_adapter(tenant.staged) if tenant.has_adapter else None

    def forget(self, lora_int_id: int) -> None:
        """Nobody comes for what has been begun under this id."""
        for key in [key for key in self._begun if key[0] == lora_int_id]:
            self._forget(key)

    def drop(self) -> None:
        """Keep no adapter any longer than the call that it was read for."""
        self._read = None

    def _forget(self, key: _Key) -> None:
        self._begun.pop(key).reading.add_done_callback(self._discarded)

    def _discarded(self, reading: Future[Admitted]) -> None:
        if reading.exception() is None:
            self._discard(reading.result()[0].staged)


def _key(request: Any) -> _Key:
    return request.lora_int_id, request.lora_name, request.lora_path
