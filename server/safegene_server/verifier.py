"""Comparison of the workers' receipts with what the family and profile files promise.

Reads the files of the family and the tenants, collects a receipt per rank through
`collective_rpc`, and remembers the profile of each served adapter as it was verified (workers serve
their own copy, so the files may change afterwards). Changes nothing in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safegene_server.error_responses import EngineDownError, plain
from safegene_vllm.errors import ConfigError, ReceiptError, SafegeneError
from safegene_vllm.formats.profile import Profile, has_profile, load_profile
from safegene_vllm.formats.receipt import Receipt, check_engine, check_tenant, gain_digest
from safegene_vllm.settings import EnginePlan, read_engine_plan

RECEIPT_TIMEOUT_S = 60.0
SHARED_S = 1.0
"""Maximum age of the report that requests without a key share."""


@dataclass(frozen=True)
class Report:
    """Result of one verification: `faults` is empty exactly if everything served is as promised.

    `ranks` has one receipt per rank, None where a worker runs without SafeGene. `tenants` has one
    entry per served name.
    """

    faults: tuple[str, ...]
    ranks: tuple[dict[str, Any] | None, ...]
    tenants: tuple[dict[str, Any], ...]

    @property
    def ready(self) -> bool:
        return not self.faults


def read_verifiable_plan(vllm_config: Any) -> EnginePlan | None:
    """Read the plan of an engine whose every rank reports to this process; None without SafeGene.

    Errors: ConfigError (settings, data parallelism), FormatError, FamilyMismatchError, BoundsError.
    """
    plan = read_engine_plan(vllm_config)
    replicas = vllm_config.parallel_config.data_parallel_size
    if plan is not None and replicas > 1:
        raise ConfigError(
            f"--data-parallel-size {replicas} with safegene: receipts reach the API server from "
            "the first replica only, so the others could not be verified; run one server per "
            "replica behind a router."
        )
    return plan


class Verifier:
    """Verification of one engine against its plan and the profiles of its adapters.

    `promised` holds the profile of each verified adapter by (name, id, path); a path in a
    registry's store is named by the digests of its content, so other content has another key.
    `on_report` is called with every report that is made.
    """

    def __init__(
        self,
        engine: Any,
        models: Any,
        plan: EnginePlan,
        *,
        on_report: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.engine = engine
        self.models = models
        self.plan = plan
        self.on_report = on_report
        self.promised: dict[tuple[str, int, str], Profile | None] = {}
        self._recent: asyncio.Future[Report] | None = None
        self._recent_until_s = 0.0

    async def receipts(self) -> list[dict[str, Any] | None]:
        """Collect one receipt per rank.

        Errors: EngineDownError; ReceiptError (the plugin is not loaded in the workers).
        """
        try:
            async with asyncio.timeout(RECEIPT_TIMEOUT_S):
                receipts = await self.engine.collective_rpc("safegene_receipt")
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
        return list(receipts)

    async def report(self) -> Report:
        """Verify everything that is served."""
        report = await self._report()
        self.on_report(report)
        return report

    async def recent_report(self) -> Report:
        """Return a report at most SHARED_S old; concurrent callers share one query of the ranks."""
        now_s = time.monotonic()
        if self._recent is None or (self._recent.done() and now_s >= self._recent_until_s):
            self._recent = asyncio.ensure_future(self.report())
            self._recent_until_s = now_s + SHARED_S
        # A client that disconnects must not cancel the report of the others.
        return await asyncio.shield(self._recent)

    async def _report(self) -> Report:
        before = dict(self._requests())
        try:
            ranks = await self.receipts()
            receipts = _parse_receipts(ranks)
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
                # Loaded during the query, and verified then.
                continue
            try:
                profile = self._check(request, receipts)
            except SafegeneError as error:
                faults.append(str(error))
            else:
                tenants.append(self._summary(served, request, profile, receipts))
        return Report(tuple(faults), tuple(ranks), tuple(tenants))

    def verify(
        self,
        request: Any,
        ranks: Sequence[dict[str, Any] | None],
        profile: Profile | None = None,
    ) -> None:
        """Check that every rank applies this adapter with `profile`; None: as its files promise.

        Errors: ReceiptError; those of reading the profile.
        """
        receipts = _parse_receipts(ranks)
        self._check_engine(receipts)
        self._check(request, receipts, profile)

    def adapters(self) -> Container[str]:
        """Return the served names of adapters."""
        return self._requests()

    def profiles(self) -> list[tuple[str, Profile | None]]:
        """Return the served names of verified adapters with their profiles."""
        return [
            (served, self.promised[_key(request)])
            for served, request in self._requests().items()
            if _key(request) in self.promised
        ]

    def protected(self, served: str) -> bool:
        """Return whether the adapter or base model served under this name has a profile."""
        request = self._requests().get(served)
        if request is None:
            return self.plan.base_profile is not None
        return self.promised.get(_key(request)) is not None

    def published(self, lora_int_id: int) -> bool:
        """Return whether some served name leads to this adapter."""
        return any(r.lora_int_id == lora_int_id for r in self._requests().values())

    def forget(self, request: Any) -> None:
        """Drop the profile of an adapter that is being removed."""
        self.promised.pop(_key(request), None)

    def _requests(self) -> dict[str, Any]:
        requests: dict[str, Any] = self.models.lora_requests
        return requests

    def _check_engine(self, receipts: Sequence[Receipt]) -> None:
        header, base = self.plan.header, self.plan.base_profile
        check_engine(receipts, family=None if header is None else header.digest)
        profile = None if base is None else base.digest
        row = None if base is None else gain_digest(base.coefficients)
        if base is None and header is not None and self.plan.settings.apply == "gain":
            row = gain_digest([0.0] * header.num_layers)
        problems = [
            f"rank {r.rank} gives requests without an adapter profile {r.base_profile} and gain "
            f"row {r.base_gain_digest}, the files say {profile} and {row}"
            for r in receipts
            if (r.base_profile, r.base_gain_digest) != (profile, row)
        ]
        if problems:
            raise ReceiptError("; ".join(problems) + ". Not served.")

    def _check(
        self, request: Any, receipts: Sequence[Receipt], given: Profile | None = None
    ) -> Profile | None:
        """Return the adapter's profile once every rank is seen to apply it, and remember it."""
        key = _key(request)
        if given is not None:
            profile: Profile | None = given
        elif key in self.promised:
            profile = self.promised[key]
        else:
            profile = self._read_profile(Path(request.lora_path))
        own = _of_adapter(receipts, request.lora_int_id)
        if profile is None:
            _check_unprotected(own, request.lora_name)
        else:
            row = gain_digest(profile.coefficients)
            check_tenant(own, request.lora_name, profile=profile.digest, gain=row)
        self.promised[key] = profile
        return profile

    def _read_profile(self, path: Path) -> Profile | None:
        open_mode = self.plan.settings.missing_profile == "serve_unprotected"
        directory = path.expanduser()
        return None if open_mode and not has_profile(directory) else load_profile(directory)

    def _summary(
        self, served: str, request: Any, profile: Profile | None, receipts: Sequence[Receipt]
    ) -> dict[str, Any]:
        """Return the tenant's entry of `/v1/safegene/ready`; `slot` is null while it is evicted."""
        held = _of_adapter(receipts, request.lora_int_id)[0].adapters[0]
        coefficients = () if profile is None else profile.coefficients
        return {
            "name": served,
            "apply": None if profile is None else self.plan.settings.apply,
            "profile": held.profile,
            "slot": held.slot,
            "sites": held.safety_sites,
            "layers": sum(1 for value in coefficients if value != 0.0),
        }


def _key(request: Any) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path


def _parse_receipts(ranks: Sequence[dict[str, Any] | None]) -> list[Receipt]:
    """Parse a receipt per rank. Errors: ReceiptError if a rank has none."""
    silent = [rank for rank, receipt in enumerate(ranks) if receipt is None]
    if silent:
        raise ReceiptError(
            f"ranks {silent} carry no SafeGene: no family is loaded there. Not served."
        )
    try:
        return [Receipt.from_dict(receipt) for receipt in ranks if receipt is not None]
    except (TypeError, KeyError) as error:
        raise out_of_step(error) from error


def out_of_step(error: Exception) -> ReceiptError:
    """Return the error for replies that vLLM's executor left over from an earlier failed call."""
    return ReceiptError(
        f"a rank replied with something that is no receipt ({error}): its replies are out of step; "
        "restart this server."
    )


def _of_adapter(receipts: Sequence[Receipt], lora_int_id: int) -> list[Receipt]:
    """Keep one adapter of each receipt: an unloaded adapter of the same name has another id."""
    return [
        replace(r, adapters=tuple(a for a in r.adapters if a.lora_int_id == lora_int_id))
        for r in receipts
    ]


def _check_unprotected(receipts: Sequence[Receipt], name: str) -> None:
    """Errors: ReceiptError if a rank lacks an adapter without a profile, or gave it one."""
    problems = []
    for r in receipts:
        held = [a for a in r.adapters if a.name == name]
        if not held:
            problems.append(f"rank {r.rank} has no adapter {name!r}")
        problems += [
            f"rank {r.rank} applied profile {a.profile}, the files have none"
            for a in held
            if a.profile is not None
        ]
    if problems:
        raise ReceiptError(f"tenant {name!r}: " + "; ".join(problems) + ". Not served.")
