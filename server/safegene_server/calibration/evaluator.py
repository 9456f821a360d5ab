"""Candidates in the engine: loaded side by side, scored on the examples, and always unloaded.

Between the search, which knows vectors, and the replica, which knows trials.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from safegene_server.calibration import scoring
from safegene_server.calibration.examples import Shots
from safegene_server.calibration.objective import Evaluation, Losses, Objective, Vector, mean
from safegene_server.calibration.scoring import Encoded
from safegene_server.error_responses import plain
from safegene_server.registry import Revision
from safegene_server.tenants import CalibrationSettings, Replica
from safegene_server.tenants.duty_cycle import DutyCycleLimiter
from safegene_server.tenants.gather import gather
from safegene_vllm.dataset import Row
from safegene_vllm.errors import AdapterRejectedError, ConfigError

logger = logging.getLogger("vllm.safegene_server")
LOOK_S = 0.5
"""How often a job that waits for the engine looks whether it is to go on."""
END_S = 60.0
"""How long it waits for the end of what it has given up; an engine that hangs never tells."""
Part = Mapping[str, Sequence[Encoded]]
_T = TypeVar("_T")
Call = Callable[[], Coroutine[Any, Any, _T]]
_ending: set[asyncio.Task[None]] = set()


class CandidateEvaluator:
    """One tenant's adapter under changing coefficients. `prepare` first."""

    def __init__(
        self,
        replica: Replica,
        revision: Revision,
        objective: Objective,
        settings: CalibrationSettings,
        share: DutyCycleLimiter,
    ) -> None:
        self.replica, self.revision = replica, revision
        self.objective, self.settings, self.share = objective, settings, share
        self.searched: Part = {}
        self.held: Part = {}

    async def prepare(self, searched: Shots, held: Shots, untouched: Vector) -> None:
        """Examples as token ids. Task and benign answers that are missing are what the tenant says
        at the coefficients `untouched`; missing refusals are the setting's.

        Errors: ConfigError (longer than the context); AdapterRejectedError (the engine takes longer
        than the setting); those of `asking`, of `begin_trial` and of the share's check. Those of
        the other methods are the same.
        """
        async with self._loaded([untouched]) as (model,):
            end = (await self._each([lambda: scoring.end_of_turn(self.replica, model)]))[0]
            self.searched = await self._encoded(model, searched, end)
            self.held = await self._encoded(model, held, end)

    async def evaluate(self, candidates: Sequence[Vector], below: float) -> list[Evaluation]:
        """Losses on the examples searched on, and on those held out of whoever is below all before.

        As many side by side as there are free slots, at least one.
        """
        looks: list[Evaluation] = []
        while len(looks) < len(candidates):
            room = max(1, min(self.settings.at_once, self.replica.free_slots()))
            chosen = candidates[len(looks) : len(looks) + room]
            async with self._loaded(chosen) as names:
                losses = await self._scored(names, self.searched)
                totals = [
                    self.objective.searched(loss, at)
                    for loss, at in zip(losses, chosen, strict=True)
                ]
                best = min(range(len(chosen)), key=lambda i: totals[i])
                parts: Losses | None = None
                if totals[best] < below:
                    below = totals[best]
                    (parts,) = await self._scored([names[best]], self.held)
            for i, at in enumerate(chosen):
                seen = parts if i == best else None
                total = None if seen is None else self.objective.held(seen)
                looks.append(Evaluation(at, totals[i], total, seen))
        return looks

    async def look(self, at: Vector) -> Evaluation:
        """Everything about one vector."""
        return (await self.evaluate([at], float("inf")))[0]

    @asynccontextmanager
    async def _loaded(self, candidates: Sequence[Vector]) -> Any:
        """Their names in the engine; out of it again however this ends."""
        names: list[str] = []

        async def begin(at: Vector) -> None:
            names.append(await self.replica.begin_trial(self.revision, self._whole(at)))

        try:
            for at in candidates:
                async with self.share.turn():
                    await self._within(begin(at))
            yield names
        finally:
            # A cancelled job must not leave its trials behind either; an engine that hangs gives
            # them back when it goes on.
            ending = asyncio.ensure_future(self._end(names))
            _ending.add(ending)
            ending.add_done_callback(_ending.discard)
            await asyncio.wait({ending}, timeout=END_S)
            if not ending.done():
                logger.error("SafeGene: trials stay loaded until the engine answers again")

    async def _end(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                await self.replica.end_trial(name)
            except Exception as error:
                # The engine's own errors as well: the other trials must go all the same.
                logger.error("SafeGene: trial %s stays loaded: %s", name, plain(error))

    def _whole(self, at: Vector) -> list[float]:
        """One coefficient per layer of the base."""
        header = self.replica.header
        values = dict(zip((entry.layer for entry in header.layers), at, strict=True))
        return [values.get(layer, 0.0) for layer in range(header.num_layers)]

    async def _scored(self, names: Sequence[str], part: Part) -> list[Losses]:
        """Mean losses per kind of each; their requests take turns, so that all slots work."""
        order = [(kind, shot) for kind, shots in part.items() for shot in shots]
        asked = list(itertools.product(order, names))

        def one(shot: Encoded, name: str) -> Call[float]:
            return lambda: scoring.mean_loss(self.replica, name, shot, self.settings.priority)

        losses = await self._each([one(shot, name) for (_, shot), name in asked])
        found: dict[tuple[str, str], list[float]] = {}
        for ((kind, _), name), loss in zip(asked, losses, strict=True):
            found.setdefault((name, kind), []).append(loss)
        return [{kind: mean(found[name, kind]) for kind in part} for name in names]

    async def _each(self, calls: Sequence[Call[_T]]) -> list[_T]:
        """All of them in order, a few at a time, each few one turn of the engine's time."""
        results: list[_T] = []
        for begin in range(0, len(calls), self.settings.in_flight):
            few = calls[begin : begin + self.settings.in_flight]
            async with self.share.turn():
                results += await self._within(gather(call() for call in few))
        return results

    async def _within(self, doing: Coroutine[Any, Any, _T]) -> _T:
        """What comes of it. Errors: AdapterRejectedError (too late); those of the share's check and
        of `doing`, which has ended then unless the engine hangs."""
        task, clock = asyncio.ensure_future(doing), asyncio.get_running_loop().time
        timeout_s = self.settings.timeout_s
        until_s = clock() + timeout_s
        try:
            while not task.done():
                self.share.check()
                if clock() >= until_s:
                    raise AdapterRejectedError(
                        f"the engine took longer than {timeout_s:g} s for a few requests of the "
                        "calibration; raise calibration.timeout_s if it is only busy"
                    )
                await asyncio.wait({task}, timeout=min(LOOK_S, until_s - clock()))
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=END_S)

    async def _encoded(self, model: str, shots: Shots, end: tuple[int, ...]) -> Part:
        rows = [(kind, row) for kind, of_kind in shots.items() for row in of_kind]
        most = [self._most(kind) for kind, _ in rows]
        heads = await self._each([self._head(model, row.prompt) for _, row in rows])
        given = await self._each([self._given(model, *row, end) for row in rows])
        # Before the tenant is asked for the answers that are missing: it refuses what is too long.
        sizes = [
            m if answer is None else len(answer) for m, answer in zip(most, given, strict=True)
        ]
        too_long = [
            f"{kind} ({len(head)} + {size} tokens)"
            for (kind, _), (head, room), size in zip(rows, heads, sizes, strict=True)
            if len(head) + size >= room
        ]
        if too_long:
            raise ConfigError(
                f"{len(too_long)} examples do not fit the engine's context: "
                f"{', '.join(too_long[:5])}; shorten or remove them"
            )
        own = [
            self._own(model, head, answer, length)
            for (head, _), answer, length in zip(heads, given, most, strict=True)
        ]
        answers = await self._each(own)
        part: dict[str, list[Encoded]] = {kind: [] for kind in shots}
        for (kind, _), (head, _), answer in zip(rows, heads, answers, strict=True):
            part[kind].append(Encoded(head, answer))
        return part

    def _most(self, kind: str) -> int:
        safety = kind == "safety"
        return self.settings.max_answer_tokens if safety else self.settings.retained_tokens

    def _head(self, model: str, prompt: str) -> Call[tuple[tuple[int, ...], int]]:
        return lambda: scoring.prompt_tokens(self.replica, model, prompt)

    def _given(
        self, model: str, kind: str, shot: Row, end: tuple[int, ...]
    ) -> Call[tuple[int, ...] | None]:
        """The answer that an example comes with; None if the tenant is to give it."""

        async def tokens() -> tuple[int, ...] | None:
            text = shot.answer or (self.settings.refusal if kind == "safety" else None)
            if text is None:
                return None
            found = await scoring.text_tokens(self.replica, model, text)
            return (*found, *end)[: self._most(kind)]

        return tokens

    def _own(
        self, model: str, head: tuple[int, ...], given: tuple[int, ...] | None, most: int
    ) -> Call[tuple[int, ...]]:
        async def tokens() -> tuple[int, ...]:
            if given is not None:
                return given
            return await scoring.own_answer(self.replica, model, head, most, self.settings.priority)

        return tokens
