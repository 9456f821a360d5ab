"""Several requests to the engine at once, of which none outlives the others."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def gather(doing: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Their results in order. However this ends, each of them has ended before.

    Errors: the first of theirs; the others are cancelled then.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in doing]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
