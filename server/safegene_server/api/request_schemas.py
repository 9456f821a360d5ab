"""Schemas of request bodies; unknown fields are rejected.

They check types and sizes only; `tenants` and the registry check the values.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat

from safegene_server.calibration import CalibrationRequest
from safegene_server.tenant_names import tenant_name_error
from safegene_server.tenants import Change

MAX_INT = 2**31 - 1
MAX_EXAMPLES = 1000
"""Maximum of one kind: a search draws tens of them, and all are in memory until the job ends."""


def _checked_name(name: str) -> str:
    if error := tenant_name_error(name):
        raise ValueError(error)
    return name


Number = Annotated[int, Field(ge=1, le=MAX_INT, strict=True)]
_EXPECTED = "the number that you believe to be published (0: none); 409 if another one is"
Expected = Annotated[int | None, Field(ge=0, le=MAX_INT, description=_EXPECTED)]
ExpectedQuery = Annotated[int | None, Query(ge=0, le=MAX_INT, description=_EXPECTED)]
TenantName = Annotated[
    str, Path(description="a tenant; its `/` may be written `%2F`", examples=["acme/support"])
]


def _representable(value: datetime) -> datetime:
    """Errors: ValueError for a year that another time zone or a database cannot represent."""
    if not 1900 <= value.year <= 9000:
        raise ValueError("expected a year from 1900 to 9000")
    return value


Timestamp = Annotated[AwareDatetime, AfterValidator(_representable)]
Id = Annotated[int, Path(ge=1, le=MAX_INT)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid")


class Limits(Body):
    """Limits of a tenant in each server process; what is left out is unlimited."""

    concurrent: Number | None = None
    requests_per_minute: Number | None = None
    tokens_per_minute: Number | None = None

    def given(self) -> dict[str, int]:
        """Return the limits that are set."""
        return {name: value for name, value in self if value is not None}


class First(Body):
    """Coefficients for new content, in one of three ways; none: its own safegene.json."""

    profile: dict[str, Any] | None = Field(None, description="a whole safegene.json")
    coefficients: FiniteFloat | list[FiniteFloat] | None = Field(
        None,
        description="one number per layer of the base, or one for all layers that carry a vector",
        examples=[1.0],
    )
    layers: dict[int, FiniteFloat] | None = Field(
        None, description="layer to coefficient; the others get 0"
    )
    publish: bool = Field(True, description="false: stop once it is ready to be published")

    def first(self) -> Change:
        """Return the coefficients as a change."""
        return Change(self.profile, self.coefficients, self.layers)


class Example(Body):
    """A prompt and its answer."""

    prompt: str = Field(min_length=1, max_length=100_000)
    answer: str | None = Field(
        None,
        max_length=100_000,
        description="null: a short refusal for `safety`, else the tenant's own completion",
    )


class Examples(Body):
    """Few-shot examples, at least two of each given kind; some are held out for evaluation."""

    safety: list[Example] = Field(
        max_length=MAX_EXAMPLES,
        description="harmful prompts, with safe answers",
        examples=[[{"prompt": "..."}]],
    )
    task: list[Example] = Field(
        max_length=MAX_EXAMPLES, description="the tenant's own task, every class of answers"
    )
    benign: list[Example] | None = Field(
        None, max_length=MAX_EXAMPLES, description="harmless prompts that must still be answered"
    )


class Calibration(Body):
    """Examples to find coefficients from. The server drops them when the job ends."""

    examples: Examples
    data: dict[str, dict[str, Any]] | None = Field(
        None,
        description="kind to the origin of its examples, for the record",
        examples=[{"safety": {"name": "advbench", "licence": "MIT"}}],
    )
    seed: int = Field(0, ge=0, le=MAX_INT)
    evaluations: int | None = Field(
        None, ge=5, le=1000, description="maximum number of candidates; null: the server's default"
    )

    def request(self) -> CalibrationRequest:
        """Return the calibration request."""
        return CalibrationRequest(
            self.examples.model_dump(), self.data, self.seed, self.evaluations
        )


class NewContent(First):
    """New content with coefficients, or with examples to find them from."""

    calibrate: Calibration | None = Field(
        None,
        description="instead of coefficients: find them on this engine, from a few examples",
        examples=[
            {
                "examples": {
                    "safety": [{"prompt": "..."}, {"prompt": "..."}],
                    "task": [
                        {"prompt": "The parcel is late.", "answer": "delivery"},
                        {"prompt": "I was billed twice.", "answer": "payment"},
                    ],
                },
                "seed": 1,
            }
        ],
    )


class Register(NewContent):
    """A new tenant: an adapter with a profile or examples to find one, or a profile on the base."""

    name: Annotated[str, AfterValidator(_checked_name)] = Field(examples=["acme/support"])
    source: str | None = Field(
        None,
        min_length=1,
        max_length=4000,
        description="a directory on the server or a URL; null: a profile on the base",
        examples=["s3://adapters/acme/support"],
    )
    limits: Limits = Limits()


class NewRevision(NewContent):
    """New content for a tenant."""

    source: str | None = Field(
        None, min_length=1, max_length=4000, description="null: the served source, read again"
    )
    expected_revision: Expected = None


class ChangeProfile(Body):
    """New coefficients for the served revision; exactly one of the first four."""

    coefficients: FiniteFloat | list[FiniteFloat] | None = Field(
        None,
        description="one number per layer of the base, or one for all layers that carry a vector",
    )
    layers: dict[int, FiniteFloat] | None = Field(
        None,
        description="layer to coefficient; the others stay as they are",
        examples=[{"12": 1.5}],
    )
    scale: FiniteFloat | None = Field(
        None, description="a factor on all coefficients", examples=[1.2]
    )
    profile: dict[str, Any] | None = Field(None, description="a whole safegene.json")
    expected_revision: Expected = None

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"scale": 1.2, "expected_revision": 3}]},
    )

    def change(self) -> Change:
        """Return the change."""
        return Change(self.profile, self.coefficients, self.layers, self.scale)


class Calibrate(Calibration):
    """Examples to find better coefficients from, for the tenant's served adapter."""

    publish: bool = Field(True, description="false: stop once it is ready to be published")
    expected_revision: Expected = None


class Publish(Body):
    """A revision to publish."""

    number: Number = Field(examples=[3])
    expected_revision: Expected = None


class Rollback(Body):
    """A revision to return to; `number` null: the one before the current revision."""

    number: Number | None = None
    expected_revision: Expected = None


class Floor(Body):
    """`floor`: layer to minimum coefficient. `{}` lifts it, which lowers no coefficients."""

    floor: dict[int, FiniteFloat] = Field(examples=[{"12": 0.5}])


class NewKey(Body):
    """A key for `tenants`: names (which need not exist yet), `base`, or `*` for all."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", examples=["acme-production"])
    scopes: list[Literal["admin", "read", "serve"]] = Field(min_length=1, examples=[["serve"]])
    tenants: list[str] = Field(min_length=1, max_length=10_000, examples=[["acme/support"]])
    default_tenant: str | None = Field(None, description="tenant of requests that name no model")
    expires_at: Timestamp | None = Field(None, examples=[datetime(2030, 1, 1)])
