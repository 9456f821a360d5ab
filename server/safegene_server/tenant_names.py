"""Names that tenants may have: those of Hugging Face repositories and vLLM's adapters.

A name is shown and compared as it is; no file is named after a tenant.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 127
"""Maximum length of a whole name; of each of its two parts, MAX_PART."""
MAX_PART = 96
_PART = rf"[^\W_][\w.:+-]{{0,{MAX_PART - 1}}}"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_NUMBER = re.compile(r"[1-9][0-9]*")


def tenant_name_error(name: object) -> str | None:
    """Return why a tenant cannot have this name, or None if it can."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_CHARACTERS:
        return (
            f"tenant name {name!r:.200}: expected letters, digits, '.', '_', ':', '+' and '-' (at "
            f"most {MAX_PART}, the first a letter or a digit), with at most one '/' between two "
            f"parts and {MAX_CHARACTERS} characters in all"
        )
    if unicodedata.normalize("NFC", name) != name:
        return (
            f"tenant name {name!r:.200}: its characters are not composed as Unicode's NFC has "
            f"them; expected {unicodedata.normalize('NFC', name)!r}"
        )
    return None


def is_revision_name(served: str, tenant: str) -> bool:
    """Return whether `served` is `tenant@N`."""
    owner, _, number = served.rpartition("@")
    return owner == tenant and _NUMBER.fullmatch(number) is not None
