"""One tree for everything that SafeGene refuses; this module imports nothing.

SafegeneError
├── FormatError             a file on disk breaks a rule of docs/reference/format.md
│   ├── MissingFileError    a file or directory is not there, or is not a regular file
│   ├── PickleRejectedError  weights exist only as a pickle (.bin, .pt, .pth, .ckpt, .pkl)
│   ├── TruncatedFileError  the file is not as long as its header promises
│   ├── HeaderError         a header, config or description cannot be parsed or has a wrong field
│   ├── VersionError        a format version that this release does not read
│   ├── DigestError         the content is not what its digest says
│   ├── NonFiniteError      NaN or infinity, in a tensor or in JSON
│   ├── ShapeError          shapes or ranks that do not fit together
│   └── SiteError           a tensor or site name that cannot be placed, or half of a pair
├── FamilyMismatchError     profile, tenant or base belongs to another family; names both
├── BoundsError             a coefficient out of bounds, a wrong count, non-zero without a vector
├── ConfigError             a setting: the message names key, value and what was expected
├── VllmCompatibilityError               a vLLM version or option that cannot be honoured
├── ApiError                a server that we asked refused, or gave no answer
├── AdapterRejectedError      this tenant is not served; others are
├── SourceError             what an owner named cannot be fetched: not allowed, down, changing
├── StoreError              this server's own disk cannot keep or give a file
├── ReceiptError            what a worker applied is not what the files promise
└── RegistryError           the registry refuses a value or a step; nothing was changed
    ├── NotFoundError        no family, tenant, revision, key, replica, rollout or job of that name
    ├── ConflictError       the state is not what the step needs, or somebody else was first
    ├── FrozenError         the tenant or its family is frozen; what it serves may not change
    ├── SchemaError         the database's schema is not the one that this release works on
    └── RegistryDownError   the database does not answer, or is busy for too long
"""

from collections.abc import Sequence


class SafegeneError(Exception):
    """Root of the tree; catch it to catch every refusal of SafeGene."""


class FormatError(SafegeneError):
    """A file on disk breaks a rule of docs/reference/format.md."""


class MissingFileError(FormatError):
    """A file or directory is not there, or is not a regular file."""


class PickleRejectedError(FormatError):
    """Weights exist only in a format that runs code when it is read."""


class TruncatedFileError(FormatError):
    """A file's length is not the length that its header promises."""


class HeaderError(FormatError):
    """A header, config or description cannot be parsed or has a wrong field."""


class VersionError(FormatError):
    """A format version that this release does not read."""


class DigestError(FormatError):
    """The content of a file is not what its digest says."""


class NonFiniteError(FormatError):
    """NaN or infinity, in a tensor or in JSON."""


class ShapeError(FormatError):
    """Shapes, ranks or dtypes of tensors that do not fit together."""


class SiteError(FormatError):
    """A tensor or site name that cannot be placed, or one half of a pair."""


class FamilyMismatchError(SafegeneError):
    """Profile, tenant or base belongs to another family; the message names both."""


class BoundsError(SafegeneError):
    """A coefficient out of bounds, a wrong number of them, or non-zero where no vector is."""


class ConfigError(SafegeneError):
    """A setting that cannot be used; the message names key, value and what was expected."""


class VllmCompatibilityError(SafegeneError):
    """vLLM's version, or an option of it, cannot be honoured."""


class ApiError(SafegeneError):
    """A server that we asked refused, or gave no answer: then `status` is None.

    `message` is the server's own; `param` the part of the request that it is about.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        advice: str = "",
    ) -> None:
        where = "" if status is None else f" (HTTP {status})"
        super().__init__(f"{message}{where}{advice and '; '}{advice}")
        self.message = message
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s


class AdapterRejectedError(SafegeneError):
    """This tenant is not served (path, profile, rank, targets); others are."""


class SourceError(SafegeneError):
    """What an owner named cannot be fetched: unreachable, not allowed, changing, too large."""


class StoreError(SafegeneError):
    """This server's own disk cannot keep or give a file: it is full, read-only or failing."""


class ReceiptError(SafegeneError):
    """What a worker applied is not what the files promise."""


class RegistryError(SafegeneError):
    """The registry refuses a value or a step; nothing was changed."""


class NotFoundError(RegistryError):
    """No family, tenant, revision, key, replica, rollout or job of that name."""


class ConflictError(RegistryError):
    """The state is not what the step needs, or somebody else was first; the message names both."""


class FrozenError(RegistryError):
    """The tenant or its family is frozen; what it serves may not change."""


class SchemaError(RegistryError):
    """The database's schema is not the one that this release works on."""


class RegistryDownError(RegistryError):
    """The database does not answer, or is busy for too long."""


MAX_SHOWN = 20
"""Errors that one message names: some are written by whoever wrote the file, by the thousand."""


def raise_errors(faults: Sequence[SafegeneError]) -> None:
    """Raise what was found, all of it in one message; do nothing if nothing was found.

    One fault is raised as it is. Several become one error of the first one's class, a line each
    for the first MAX_SHOWN.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        lines = [f"- {type(fault).__name__}: {fault}" for fault in faults[:MAX_SHOWN]]
        if len(faults) > MAX_SHOWN:
            lines.append(f"- and {len(faults) - MAX_SHOWN} more")
        raise type(faults[0])("\n".join([f"{len(faults)} faults:", *lines]))
