"""Compares what the workers' receipts say with what the files promised.

For one API process: it reads the files of the family and the tenants, asks every rank through
`collective_rpc`, and remembers what each served tenant promised when it was let in (files may
change or go afterwards; workers serve their own copy). Changes nothing in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safegene_server.error_responses import EngineDownError, plain
from safegene_vllm.errors import ConfigError, ReceiptError, SafegeneError
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import Profile, check_profile, has_profile, load_profile
from safegene_vllm.formats.receipt import Receipt, check_engine, check_tenant, gain_digest
from safegene_vllm.settings import Settings, parse_settings

RECEIPT_TIMEOUT_S = 60.0
SHARED_S = 1.0
"""How old a report may be for who needs no key to ask for it."""


@dataclass(frozen=True)
class Expected:
    """What an engine's files promise: settings, family, and the profile of the base model."""

    settings: Settings
    header: FamilyHeader | None
    base: Profile | None


@dataclass(frozen=True)
class Report:
    """What was found: `faults` is empty if and only if everything served is as promised.

    `ranks` has one entry per rank, None where a worker carries no SafeGene. `tenants` has one
    entry per served name.
    """

    faults: tuple[str, ...]
    ranks: tuple[dict[str, Any] | None, ...]
    tenants: tuple[dict[str, Any], ...]

    @property
    def ready(self) -> bool:
        return not self.faults


def read_expected(vllm_config: Any) -> Expected | None:
    """What the files of this engine promise; None where it was started without a `safegene` key.

    Errors: ConfigError (settings, data parallelism), FormatError, FamilyMismatchError, BoundsError.
    """
    load_format = str(vllm_config.load_config.load_format)
    settings = parse_settings(vllm_config.additional_config, load_format=load_format)
    if settings is None:
        return None
    replicas = vllm_config.parallel_config.data_parallel_size
    if replicas > 1:
        raise ConfigError(
            f"--data-parallel-size {replicas} with safegene: receipts reach the API server from "
            "the first replica only, so the others could not be verified; run one server per "
            "replica behind a router."
        )
    if settings.family is None:
        return Expected(settings, None, None)
    header = read_family_header(settings.family)
    source = settings.base_profile
    if settings.apply == "weights":
        source = settings.profile or Path(vllm_config.model_config.model)
    base = None if source is None else load_profile(source)
    if base is not None:
        check_profile(base, header)
    return Expected(settings, header, base)


class Verifier:
    """One engine's promises; `promised` grows as tenants pass, keyed by (name, id, path). A path in
    a registry's store is named by the digests of its content, so other content is another key."""

    def __init__(self, engine: Any, models: Any, expected: Expected) -> None:
        self.engine = engine
        self.models = models
        self.expected = expected
        self.promised: dict[tuple[str, int, str], Profile | None] = {}
        self.told: Callable[[Report], None] = lambda report: None
        """Called with every report that is made; set by whoever wants to know."""
        self._look: asyncio.Future[Report] | None = None
        self._look_until_s = 0.0

    async def ask(self) -> list[dict[str, Any] | None]:
        """One answer per rank. Errors: EngineDownError, ReceiptError (the plugin is not there)."""
        try:
            async with asyncio.timeout(RECEIPT_TIMEOUT_S):
                answers = await self.engine.collective_rpc("safegene_receipt")
        except TimeoutError:
            raise EngineDownError(
                f"the engine gave no receipts within {RECEIPT_TIMEOUT_S:.0f} s."
            ) from None
        except Exception as error:
            if getattr(self.engine, "errored", False):
                raise EngineDownError(f"the engine is down: {plain(error)}") from error
            raise ReceiptError(
                f"the workers gave no receipts ({plain(error)}): the SafeGene plugin is not loaded "
                "there; name `safegene` in VLLM_PLUGINS."
            ) from error
        return list(answers)

    async def report(self) -> Report:
        """Everything that is served, held against its promise."""
        found = await self._report()
        self.told(found)
        return found

    async def recent(self) -> Report:
        """A report of the last second, for those who may ask as often as they like: one look at the
        ranks, shared by all who ask meanwhile."""
        now_s = time.monotonic()
        if self._look is None or (self._look.done() and now_s >= self._look_until_s):
            self._look = asyncio.ensure_future(self.report())
            self._look_until_s = now_s + SHARED_S
        # Whoever hangs up ends nobody else's look.
        return await asyncio.shield(self._look)

    async def _report(self) -> Report:
        before = dict(self._requests())
        try:
            answers = await self.ask()
            receipts = _receipts(answers)
        except (SafegeneError, EngineDownError) as error:
            return Report((str(error),), (), ())
        faults: list[str] = []
        try:
            self._check_engine(receipts)
        except ReceiptError as error:
            faults.append(str(error))
        tenants = []
        for served, request in list(self._requests().items()):
            if before.get(served) is not request:
                # It came while the ranks were asked, and was verified on its own.
                continue
            try:
                profile = self._check(request, receipts)
            except SafegeneError as error:
                faults.append(str(error))
            else:
                tenants.append(self._summary(served, request, profile, receipts))
        return Report(tuple(faults), tuple(answers), tuple(tenants))

    def verify(self, request: Any, answers: Sequence[dict[str, Any] | None]) -> None:
        """Errors: ReceiptError unless in every rank's answer this adapter is as its files promise;
        what the files themselves may raise.
        """
        receipts = _receipts(answers)
        self._check_engine(receipts)
        self._check(request, receipts)

    def profiles(self) -> list[tuple[str, Profile | None]]:
        """Served names of adapters and the profiles that were promised for them, once verified."""
        found = []
        for served, request in self._requests().items():
            key = (request.lora_name, request.lora_int_id, request.lora_path)
            if key in self.promised:
                found.append((served, self.promised[key]))
        return found

    def protected(self, served: str) -> bool:
        """Whether what answers under this name, an adapter or the base, has a profile."""
        request = self._requests().get(served)
        if request is None:
            return self.expected.base is not None
        key = (request.lora_name, request.lora_int_id, request.lora_path)
        return self.promised.get(key) is not None

    def published(self, lora_int_id: int) -> bool:
        """Whether some served name leads to this adapter."""
        return any(r.lora_int_id == lora_int_id for r in self._requests().values())

    def forget(self, request: Any) -> None:
        """What was promised of an adapter that is being removed."""
        self.promised.pop((request.lora_name, request.lora_int_id, request.lora_path), None)

    def _requests(self) -> dict[str, Any]:
        requests: dict[str, Any] = self.models.lora_requests
        return requests

    def _check_engine(self, receipts: Sequence[Receipt]) -> None:
        header, base = self.expected.header, self.expected.base
        check_engine(receipts, family=None if header is None else header.digest)
        profile = None if base is None else base.digest
        row = None if base is None else gain_digest(base.coefficients)
        if base is None and header is not None and self.expected.settings.apply == "gain":
            row = gain_digest([0.0] * header.num_layers)
        faults = [
            f"rank {r.rank} gives requests without an adapter profile {r.base_profile} and gain "
            f"row {r.base_gain_digest}, the files say {profile} and {row}"
            for r in receipts
            if (r.base_profile, r.base_gain_digest) != (profile, row)
        ]
        if faults:
            raise ReceiptError("; ".join(faults) + ". Not served.")

    def _check(self, request: Any, receipts: Sequence[Receipt]) -> Profile | None:
        """The promised profile, once every rank is seen to keep it; remembered from then on."""
        key = (request.lora_name, request.lora_int_id, request.lora_path)
        if key in self.promised:
            profile = self.promised[key]
        else:
            profile = self._read_profile(Path(request.lora_path))
        mine = _of_adapter(receipts, request.lora_int_id)
        if profile is None:
            _check_unprotected(mine, request.lora_name)
        else:
            row = gain_digest(profile.coefficients)
            check_tenant(mine, request.lora_name, profile=profile.digest, gain=row)
        self.promised[key] = profile
        return profile

    def _read_profile(self, path: Path) -> Profile | None:
        open_mode = self.expected.settings.missing_profile == "serve_unprotected"
        directory = path.expanduser()
        return None if open_mode and not has_profile(directory) else load_profile(directory)

    def _summary(
        self, served: str, request: Any, profile: Profile | None, receipts: Sequence[Receipt]
    ) -> dict[str, Any]:
        """What `/v1/safegene/ready` says of one tenant; `slot` is null while it is evicted."""
        held = _of_adapter(receipts, request.lora_int_id)[0].adapters[0]
        coefficients = () if profile is None else profile.coefficients
        return {
            "name": served,
            "apply": None if profile is None else self.expected.settings.apply,
            "profile": held.profile,
            "slot": held.slot,
            "sites": held.safety_sites,
            "layers": sum(1 for value in coefficients if value != 0.0),
        }


def _receipts(answers: Sequence[dict[str, Any] | None]) -> list[Receipt]:
    """Errors: ReceiptError if a rank has none to give."""
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    if silent:
        raise ReceiptError(
            f"ranks {silent} carry no SafeGene: no family is loaded there. Not served."
        )
    try:
        return [Receipt.from_dict(answer) for answer in answers if answer is not None]
    except (TypeError, KeyError) as error:
        raise out_of_step(error) from error


def out_of_step(error: Exception) -> ReceiptError:
    """What vLLM's executor hands on after a worker has raised in an earlier call."""
    return ReceiptError(
        f"a rank answered something that is no receipt ({error}): its replies are out of step; "
        "restart this server."
    )


def _of_adapter(receipts: Sequence[Receipt], lora_int_id: int) -> list[Receipt]:
    """The receipts with one adapter alone: a name that was unloaded may still have older ids."""
    return [
        replace(r, adapters=tuple(a for a in r.adapters if a.lora_int_id == lora_int_id))
        for r in receipts
    ]


def _check_unprotected(receipts: Sequence[Receipt], name: str) -> None:
    """Errors: ReceiptError if a rank lacks an adapter that has no profile, or gave it one."""
    faults = []
    for r in receipts:
        mine = [a for a in r.adapters if a.name == name]
        if not mine:
            faults.append(f"rank {r.rank} has no adapter {name!r}")
        faults += [
            f"rank {r.rank} applied profile {a.profile}, the files have none"
            for a in mine
            if a.profile is not None
        ]
    if faults:
        raise ReceiptError(f"tenant {name!r}: " + "; ".join(faults) + ". Not served.")
