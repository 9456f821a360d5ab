"""What the routes are asked with: bodies as pydantic models, unknown fields refused.

Types and sizes alone; what the values mean is for tenant life and the registry to judge.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat

from safegene_server.calibration import CalibrationRequest
from safegene_server.tenants import Change

LARGEST = 2**31 - 1
MOST_EXAMPLES = 1000
"""Of one kind: a search draws tens of them, and every one is kept until its job ends."""
_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62})?$"

Number = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Expected = Annotated[
    int | None,
    Field(
        ge=0,
        le=LARGEST,
        description="the number that you believe to be published (0: none); 409 if another one is",
    ),
]
ExpectedQuery = Annotated[
    int | None,
    Query(
        ge=0,
        le=LARGEST,
        description="the number that you believe to be published (0: none); 409 if another one is",
    ),
]
TenantName = Annotated[
    str, Path(description="a tenant; its `/` may be written `%2F`", examples=["acme/support"])
]


def _between(value: datetime) -> datetime:
    """Errors: ValueError where another time zone, or a store, could not tell this moment."""
    if not 1900 <= value.year <= 9000:
        raise ValueError("expected a year from 1900 to 9000")
    return value


Moment = Annotated[AwareDatetime, AfterValidator(_between)]
Id = Annotated[int, Path(ge=1, le=LARGEST)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Limits(Body):
    """What a tenant may take in each server process; what is left out has no limit."""

    concurrent: Number | None = None
    requests_per_minute: Number | None = None
    tokens_per_minute: Number | None = None

    def given(self) -> dict[str, int]:
        return {name: value for name, value in self if value is not None}


class First(Body):
    """Coefficients for new content, in one of three ways; none: the safegene.json beside it."""

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
        return Change(self.profile, self.coefficients, self.layers)


class Example(Body):
    prompt: str = Field(min_length=1, max_length=100_000)
    answer: str | None = Field(
        None,
        max_length=100_000,
        description="null: a short refusal for `safety`, else what the tenant itself says",
    )


class Examples(Body):
    """At least two of each kind that is given; some are held out to judge by."""

    safety: list[Example] = Field(
        max_length=MOST_EXAMPLES,
        description="harmful prompts, with safe answers",
        examples=[[{"prompt": "..."}]],
    )
    task: list[Example] = Field(
        max_length=MOST_EXAMPLES, description="the tenant's own task, every class of answers"
    )
    benign: list[Example] | None = Field(
        None, max_length=MOST_EXAMPLES, description="harmless prompts that must still be answered"
    )


class Calibration(Body):
    """A few examples to find coefficients from. The server forgets them when the job ends."""

    examples: Examples
    data: dict[str, dict[str, Any]] | None = Field(
        None,
        description="kind to where its examples are from, for the record",
        examples=[{"safety": {"name": "advbench", "licence": "MIT"}}],
    )
    seed: int = Field(0, ge=0, le=LARGEST)
    evaluations: int | None = Field(
        None, ge=5, le=1000, description="candidates at most; null: the server's own choice"
    )

    def asked(self) -> CalibrationRequest:
        return CalibrationRequest(
            self.examples.model_dump(), self.data, self.seed, self.evaluations
        )


class NewContent(First):
    calibrate: Calibration | None = Field(
        None,
        description="in place of coefficients: find them on this engine, from a few examples",
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

    name: str = Field(pattern=_NAME, examples=["acme/support"])
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
    """Other coefficients for what is served now; exactly one of the first four."""

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
        return Change(self.profile, self.coefficients, self.layers, self.scale)


class Calibrate(Calibration):
    """A few examples to find better coefficients from, for what the tenant has."""

    publish: bool = Field(True, description="false: stop once it is ready to be published")
    expected_revision: Expected = None


class Publish(Body):
    number: Number = Field(examples=[3])
    expected_revision: Expected = None


class Rollback(Body):
    """`number` null: what was served before the current revision."""

    number: Number | None = None
    expected_revision: Expected = None


class Floor(Body):
    """`floor`: layer to least coefficient. `{}` lifts it, which lowers nobody's coefficients."""

    floor: dict[int, FiniteFloat] = Field(examples=[{"12": 0.5}])


class NewKey(Body):
    """A key for `tenants`: names (which need not exist yet), `base`, or `*` for all."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", examples=["acme-production"])
    scopes: list[Literal["admin", "read", "serve"]] = Field(min_length=1, examples=[["serve"]])
    tenants: list[str] = Field(min_length=1, max_length=10_000, examples=[["acme/support"]])
    default_tenant: str | None = Field(
        None, description="who answers where a request names no model"
    )
    expires_at: Moment | None = Field(None, examples=[datetime(2030, 1, 1)])
