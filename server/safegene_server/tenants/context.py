"""`Tenancy`: the registry, the store and this process's engine, as one thing to hand around.

The engine is known by a protocol only, so that this room needs neither vLLM nor a running one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import httpx

from safegene_server.artifacts import Store
from safegene_server.error_responses import EngineDownError, plain
from safegene_server.registry import Registry, Revision
from safegene_server.tenants.settings import TenantSettings
from safegene_vllm.errors import SafegeneError
from safegene_vllm.formats.family import FamilyHeader

logger = logging.getLogger("vllm.safegene_server")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Replica(Protocol):
    """The engine of this process, as it follows the registry.

    `load` puts a revision into the engine, receipts verified, without offering it; loading what is
    loaded does nothing, and `apply` leaves it there until `unload`, which spares what is served or
    would be gone back to. `call` asks vLLM's own app as a client would, with `model` = `tenant@N`,
    past keys and limits. `begin_trial` loads a revision's adapter with other coefficients under a
    name that no tenant can have, until `end_trial`; `in_flight` counts the tenants' own requests.
    `offered` are tenants and the revisions that their names lead to here, and what is asked within
    `keeping` is not removed meanwhile.
    """

    @property
    def id(self) -> str: ...

    @property
    def header(self) -> FamilyHeader: ...

    async def apply(self) -> None: ...

    async def load(self, revision: Revision, path: Path | None = None) -> None: ...

    async def unload(self, revision: Revision) -> None: ...

    async def begin_trial(self, revision: Revision, coefficients: Sequence[float]) -> str: ...

    async def end_trial(self, name: str) -> None: ...

    def free_slots(self) -> int: ...

    def in_flight(self) -> int: ...

    def offered(self) -> list[tuple[str, Revision]]: ...

    def keeping(self, served: str) -> AbstractContextManager[None]: ...

    def schedules_by_priority(self) -> bool: ...

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response: ...

    def faults(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class TenantContext:
    """What every step of tenant life works with."""

    replica: Replica
    registry: Registry
    store: Store
    settings: TenantSettings
    job_added: asyncio.Event = field(default_factory=asyncio.Event, repr=False, compare=False)
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    def changing(self, tenant: str) -> asyncio.Lock:
        """Held while this process changes a tenant: two changes here wait for each other, and only
        those of two processes conflict."""
        return self._locks.setdefault(tenant, asyncio.Lock())

    async def settle(self) -> None:
        """Follow the registry now. A failure here is told by the rollout, not by the change, which
        is in the registry already."""
        await _told(self.replica.apply, "this server does not follow the registry yet")

    @asynccontextmanager
    async def trying(self, revision: Revision) -> AsyncIterator[None]:
        """What is loaded of a revision meanwhile goes again if it comes to nothing, however that
        happens; what is served or kept as a way back stays."""
        try:
            yield
        except BaseException:
            await self.withdraw(revision)
            raise

    async def withdraw(self, revision: Revision) -> None:
        """Out of the engine, if it can be; nobody is offered it."""
        await _told(lambda: self.replica.unload(revision), f"{revision.served_name} stays loaded")


async def aside(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """A blocking call of registry or store, in a thread."""
    return await asyncio.to_thread(call, *args, **kwargs)


async def _told(step: Callable[[], Awaitable[None]], what: str) -> None:
    try:
        await step()
    except (SafegeneError, EngineDownError) as error:
        logger.error("SafeGene: %s: %s", what, plain(error))
