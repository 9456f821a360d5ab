"""Candidates in the engine: loaded side by side, scored on the examples, and always unloaded.

Between the search, which knows vectors, and the replica, which knows trials.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from safegene_server.answers import plain
from safegene_server.calibrating import asking
from safegene_server.calibrating.asking import Encoded
from safegene_server.calibrating.objective import Look, Losses, Objective, Vector, mean
from safegene_server.calibrating.shots import Shots
from safegene_server.registry import Revision
from safegene_server.tenants import CalibrationSettings, Replica
from safegene_server.tenants.share import Share
from safegene_vllm.errors import ConfigError

logger = logging.getLogger("vllm.safegene_server")
Part = Mapping[str, Sequence[Encoded]]
_T = TypeVar("_T")


class Bench:
    """One tenant's adapter under changing coefficients. `prepare` first."""

    def __init__(
        self,
        replica: Replica,
        revision: Revision,
        objective: Objective,
        settings: CalibrationSettings,
        share: Share,
    ) -> None:
        self.replica, self.revision = replica, revision
        self.objective, self.settings, self.share = objective, settings, share
        self.searched: Part = {}
        self.held: Part = {}

    async def prepare(self, searched: Shots, held: Shots, untouched: Vector) -> None:
        """Examples as token ids. Task and benign answers that are missing are what the tenant says
        at the coefficients `untouched`; missing refusals are the setting's.

        Errors: ConfigError (longer than the context); those of `asking` and `begin_trial`.
        """
        async with self._loaded([untouched]) as (model,):
            end = (await self._each([lambda: asking.end_of_turn(self.replica, model)]))[0]
            self.searched = await self._encoded(model, searched, end)
            self.held = await self._encoded(model, held, end)

    async def evaluate(self, candidates: Sequence[Vector], below: float) -> list[Look]:
        """Losses on the examples searched on, and on those held out of whoever is below all before.

        As many side by side as there are free slots, at least one.
        """
        looks: list[Look] = []
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
                looks.append(Look(at, totals[i], total, seen))
        return looks

    async def look(self, at: Vector) -> Look:
        """Everything about one vector."""
        return (await self.evaluate([at], float("inf")))[0]

    @asynccontextmanager
    async def _loaded(self, candidates: Sequence[Vector]) -> Any:
        """Their names in the engine; out of it again however this ends."""
        names: list[str] = []
        try:
            for at in candidates:
                async with self.share.turn():
                    names.append(await self.replica.begin_trial(self.revision, self._whole(at)))
            yield names
        finally:
            # A cancelled job must not leave its trials behind either.
            await asyncio.shield(asyncio.ensure_future(self._end(names)))

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

        def one(shot: Encoded, name: str) -> Callable[[], Awaitable[float]]:
            return lambda: asking.mean_loss(self.replica, name, shot, self.settings.priority)

        losses = await self._each([one(shot, name) for (_, shot), name in asked])
        found: dict[tuple[str, str], list[float]] = {}
        for ((kind, _), name), loss in zip(asked, losses, strict=True):
            found.setdefault((name, kind), []).append(loss)
        return [{kind: mean(found[name, kind]) for kind in part} for name in names]

    async def _each(self, calls: Sequence[Callable[[], Awaitable[_T]]]) -> list[_T]:
        """All of them in order, a few at a time, each few one turn of the engine's time."""
        results: list[_T] = []
        for begin in range(0, len(calls), self.settings.in_flight):
            async with self.share.turn():
                tasks = [
                    asyncio.ensure_future(call())
                    for call in calls[begin : begin + self.settings.in_flight]
                ]
                try:
                    results += await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks)
        return results

    async def _encoded(self, model: str, shots: Shots, end: tuple[int, ...]) -> Part:
        part: dict[str, list[Encoded]] = {}
        too_long = []
        for kind, rows in shots.items():
            safety = kind == "safety"
            most = self.settings.max_answer_tokens if safety else self.settings.retained_tokens
            texts = [row.answer or (self.settings.refusal if safety else None) for row in rows]
            heads = await self._each([self._head(model, row.prompt) for row in rows])
            answers = await self._each(
                [
                    self._answer(model, head, text, end, most)
                    for (head, _), text in zip(heads, texts, strict=True)
                ]
            )
            part[kind] = [Encoded(h, a) for (h, _), a in zip(heads, answers, strict=True)]
            too_long += [
                f"{kind} ({len(shot.prompt)} + {len(shot.answer)} tokens)"
                for shot, (_, room) in zip(part[kind], heads, strict=True)
                if len(shot.prompt) + len(shot.answer) >= room
            ]
        if too_long:
            raise ConfigError(
                f"{len(too_long)} examples do not fit the engine's context: "
                f"{', '.join(too_long[:5])}; shorten or remove them"
            )
        return part

    def _head(
        self, model: str, prompt: str
    ) -> Callable[[], Awaitable[tuple[tuple[int, ...], int]]]:
        return lambda: asking.prompt_tokens(self.replica, model, prompt)

    def _answer(
        self, model: str, head: tuple[int, ...], text: str | None, end: tuple[int, ...], most: int
    ) -> Callable[[], Awaitable[tuple[int, ...]]]:
        async def tokens() -> tuple[int, ...]:
            if text is None:
                return await asking.own_answer(
                    self.replica, model, head, most, self.settings.priority
                )
            return (*await asking.text_tokens(self.replica, model, text), *end)[:most]

        return tokens
