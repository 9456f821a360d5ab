"""SafeGene's error tree; this module imports nothing of SafeGene.

The `safegene` command prints any of these as one message and exits with code 1. A server responds
with the HTTP status in brackets, inherited down the tree.

SafegeneError               [400]
├── FormatError             a file violates docs/reference/format.md
│   ├── MissingFileError    [404] a file or directory is missing, or is not a regular file
│   ├── PickleRejectedError  weights exist only as a pickle (.bin, .pt, .pth, .ckpt, .pkl)
│   ├── TruncatedFileError  the file's length differs from that in its header
│   ├── HeaderError         a header, config or description cannot be parsed or has a wrong field
│   ├── VersionError        a format version that this release does not read
│   ├── DigestError         the content does not match its digest
│   ├── NonFiniteError      NaN or infinity, in a tensor or in JSON
│   ├── ShapeError          shapes or ranks that do not match
│   └── SiteError           an unknown tensor or site name, or only one of LoRA A and B
├── FamilyMismatchError     profile, tenant or base belongs to another family; names both
├── BoundsError             a coefficient out of bounds, a wrong count, non-zero without a vector
├── ConfigError             a setting: the message names key, value and what was expected
├── VllmCompatibilityError  an unsupported vLLM version or option
├── ApiError                a server rejected our request, or did not respond
├── AdapterRejectedError    this tenant is not served; others are
├── SourceError             a tenant's source cannot be fetched: not allowed, down, changing
├── StoreError              [507] this server's own disk cannot store or read a file
├── ReceiptError            [500] what a worker applied is not what the files say
└── RegistryError           the registry rejects a value or a step; nothing was changed
    ├── NotFoundError       [404] no family, tenant, revision, key, replica, rollout or job
    ├── ConflictError       [409] the state is not what the step needs, or another change was first
    ├── FrozenError         [409] the tenant or its family is frozen; its content may not change
    ├── SchemaError         [503] the database schema is not the one of this release
    └── RegistryDownError   [503] the database does not respond, or is busy for too long
        └── RestoredError   [503] the registry lost changes that this server has seen
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint with the nearest known name; empty if none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class SafegeneError(Exception):
    """Root of the tree.

    `public` is the message for API keys, which learn no path of the server. None: the message
    itself, or a generic one where it names a path (`error_responses.public_message`).
    """

    def __init__(self, *args: object, public: str | None = None) -> None:
        super().__init__(*args)
        self.public = public


class FormatError(SafegeneError):
    """A file violates docs/reference/format.md; raised by the loaders of formats/."""


class MissingFileError(FormatError):
    """A file or directory is missing, or is not a regular file."""


class PickleRejectedError(FormatError):
    """Weights exist only in a format that runs code when it is read."""


class TruncatedFileError(FormatError):
    """A file's length differs from the length in its header."""


class HeaderError(FormatError):
    """A header, config or description cannot be parsed or has a wrong field."""


class VersionError(FormatError):
    """A format version that this release does not read."""


class DigestError(FormatError):
    """The content of a file does not match its digest."""


class NonFiniteError(FormatError):
    """NaN or infinity, in a tensor or in JSON."""


class ShapeError(FormatError):
    """Shapes, ranks or dtypes of tensors that do not match."""


class SiteError(FormatError):
    """An unknown tensor or site name, or a target module with only one of LoRA A and B."""


class FamilyMismatchError(SafegeneError):
    """Profile, tenant or base belongs to another family; the message names both.

    Raised wherever two of them meet: launcher, workers, registry, recipe.
    """


class BoundsError(SafegeneError):
    """A coefficient out of bounds, a wrong number of them, or non-zero without a vector."""


class ConfigError(SafegeneError):
    """An invalid setting, option or argument; names key, value and what was expected."""


class VllmCompatibilityError(SafegeneError):
    """An unsupported vLLM version or option; raised by the plugin's compatibility table."""


class ApiError(SafegeneError):
    """A server rejected a request of `safegene_vllm.client`, or did not respond (`status` None).

    `message` is the server's own; `param` the part of the request at fault.
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
    """A tenant is not served (path, profile, rank, target modules); others are.

    Raised by the launcher before the start, and by the workers when an adapter is loaded.
    """


class SourceError(SafegeneError):
    """A tenant's source cannot be fetched: unreachable, not allowed, changing, too large.

    Raised by the server's artifact sources; a job fails with it as its message.
    """


class StoreError(SafegeneError):
    """The server's own disk cannot store or read a file: it is full, read-only or failing."""


class ReceiptError(SafegeneError):
    """A worker's receipt differs from the files; raised by the verifier, also after loading."""


class RegistryError(SafegeneError):
    """The registry rejects a value or a step; nothing was changed."""


class NotFoundError(RegistryError):
    """No family, tenant, revision, key, replica, rollout or job of that name."""


class ConflictError(RegistryError):
    """The state is not what the step needs, or another change was first; names both."""


class FrozenError(RegistryError):
    """The tenant or its family is frozen; its content may not change."""


class SchemaError(RegistryError):
    """The database schema is not the one of this release; run the migration."""


class RegistryDownError(RegistryError):
    """The database does not respond, or is busy for too long."""


class RestoredError(RegistryDownError):
    """The registry lost changes that this server has seen: restored, or failed over to a standby.

    Raised until the server follows the registry as it is now.
    """


MAX_SHOWN = 20
"""Maximum number of errors in one message: an untrusted file can cause thousands."""
MAX_ALIKE = 3
"""Of these, the maximum that differ only in quoted names and numbers."""
MAX_CHARS = 8_000
"""Maximum length of a combined message, and of any that is stored."""
_VARIABLE = re.compile(r"'[^']*'|\b[\w.]*\.\d+\.[\w.]*|\d+")


def shorten(message: str, limit: int = MAX_CHARS) -> str:
    """Return the message, cut at `limit` characters if it is longer, with the number left out."""
    if len(message) <= limit:
        return message
    return f"{message[: limit - 40]}… ({len(message) - limit + 40} more characters)"


def raise_errors(errors: Sequence[SafegeneError]) -> None:
    """Raise all `errors` in one message; do nothing if there are none.

    A single error is raised itself. Several become one of the first one's class, a line each for
    the first MAX_SHOWN, of which MAX_ALIKE of one kind, with the number of the others.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kinds: dict[str, list[str]] = {}
        for error in errors:
            line = f"- {type(error).__name__}: {error}"
            kinds.setdefault(_VARIABLE.sub("…", line), []).append(line)
        lines: list[str] = []
        hidden = 0
        for alike in kinds.values():
            shown = [shorten(line, 1_000) for line in alike[:MAX_ALIKE]]
            if len(lines) + len(shown) > MAX_SHOWN:
                hidden += len(alike)
                continue
            if len(alike) > len(shown):
                shown[-1] += f" (and {len(alike) - len(shown)} more like this)"
            lines += shown
        if hidden:
            lines.append(f"- and {hidden} more")
        raise type(errors[0])(shorten("\n".join([f"{len(errors)} errors:", *lines])))
