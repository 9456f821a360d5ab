"""Background reading and validation of adapters, so that the engine's steps go on meanwhile.

The worker's own thread takes the result over and gives it a LoRA slot. A tenant that is never taken
over is discarded.
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

UNCLAIMED_S = 60.0
"""Time after the last request for a validated tenant until it is discarded."""

Validated = tuple[Tenant, Adapter | None]
"""A tenant, and its adapter if that has just been read."""
_Key = tuple[int, str, str]


@dataclass
class _Prefetch:
    reading: Future[Validated]
    requested_s: float


class AdapterPrefetcher:
    """Prefetches by (id, name, path), one at a time.

    `validate(name, path)` reads and checks; `discard` removes the staged copy of a tenant that was
    not taken over.
    """

    def __init__(
        self, validate: Callable[[str, str], Validated], discard: Callable[[Path], None]
    ) -> None:
        self._validate, self._discard = validate, discard
        self._thread = ThreadPoolExecutor(1, "safegene-prefetch")
        self._prefetches: dict[_Key, _Prefetch] = {}
        self._read: tuple[Path, Adapter] | None = None

    def begin(self, request: Any) -> bool:
        """Start reading a LoRARequest's tenant, unless started; return whether it has ended."""
        now_s, key = time.monotonic(), _key(request)
        for other, prefetch in list(self._prefetches.items()):
            if prefetch.reading.done() and now_s - prefetch.requested_s > UNCLAIMED_S:
                self._forget(other)
        if key not in self._prefetches:
            reading = self._thread.submit(self._validate, request.lora_name, request.lora_path)
            self._prefetches[key] = _Prefetch(reading, now_s)
        self._prefetches[key].requested_s = now_s
        return self._prefetches[key].reading.done()

    def tenant(self, request: Any) -> Tenant:
        """Return the validated tenant; waits for a prefetch, or reads it now if there is none.

        Its adapter stays available to `adapter` until `drop`. Errors: those of validation.
        """
        started = self._prefetches.pop(_key(request), None)
        self.drop()
        if started is None:
            tenant, adapter = self._validate(request.lora_name, request.lora_path)
        else:
            tenant, adapter = started.reading.result()
        self._read = None if adapter is None else (tenant.staged, adapter)
        return tenant

    def adapter(self, tenant: Tenant) -> Adapter | None:
        """Return the adapter once as it was read, later from the staged copy.

        None for a profile alone. Errors: those of `load_adapter`.
        """
        read, self._read = self._read, None
        if read is not None and read[0] == tenant.staged:
            return read[1]
        return load_adapter(tenant.staged) if tenant.has_adapter else None

    def forget(self, lora_int_id: int) -> None:
        """Discard all prefetches under this id."""
        for key in [key for key in self._prefetches if key[0] == lora_int_id]:
            self._forget(key)

    def drop(self) -> None:
        """Release the adapter that was read last: it is only for the call that read it."""
        self._read = None

    def _forget(self, key: _Key) -> None:
        self._prefetches.pop(key).reading.add_done_callback(self._discard_result)

    def _discard_result(self, reading: Future[Validated]) -> None:
        if reading.exception() is None:
            self._discard(reading.result()[0].staged)


def _key(request: Any) -> _Key:
    return request.lora_int_id, request.lora_name, request.lora_path
