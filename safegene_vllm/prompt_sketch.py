"""Digests and sketches of prompts: the split by prompt, and the search for used prompts. No text.

A record of used prompts holds per prompt 64 bits of the SHA-256 of its normalized text and 64
MinHash values of 4 bits over its word 3-grams (Broder 1997; b bits: Li & König 2010). Torch-free.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

FORM = "sha256/64 + minhash 64x4 of word 3-grams"
PARTS = ("train", "held-out")
HELD_OUT_PERCENT = 20
"""Enough of some hundred prompts to measure a loss on; most of them are left to train on."""
MAX_RECORDED = 512
"""Prompts recorded per data set, 28 kB; of more, those with the smallest digests: a fair sample."""
MIN_JACCARD = 0.8
"""Estimated similarity from which two prompts count as near-duplicates."""
MAX_WORDS = 400
"""Words of a prompt that are compared, so that a long document takes no minutes."""
MAX_CACHED = 8192
"""Prompts whose digest and signature are cached: a set is compared with several uses."""
_PERMUTATIONS = 64
_PRIME = (1 << 61) - 1
_FACTORS = [
    (int.from_bytes(digest[:7], "big") + 1, int.from_bytes(digest[7:14], "big"))
    for number in range(_PERMUTATIONS)
    for digest in [hashlib.sha256(f"safegene minhash {number}".encode()).digest()]
]
_LOW_BITS = int("1" * _PERMUTATIONS, 16)
_RECORD_BYTES = 8 + _PERMUTATIONS // 2

Part = Literal["train", "held-out"]


def normalized(prompt: str) -> str:
    """The prompt in lower case, without punctuation, its words separated by one space."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(re.findall(r"\w+", text)) or text.strip()


@lru_cache(maxsize=MAX_CACHED)
def digest_of_prompt(prompt: str) -> int:
    """The first 64 bits of the SHA-256 of the normalized prompt."""
    return int.from_bytes(hashlib.sha256(normalized(prompt).encode()).digest()[:8], "big")


def part_of(prompt: str) -> Part:
    """The part of a prompt, from its digest alone: the same in every command and every file."""
    return "held-out" if digest_of_prompt(prompt) % 100 < HELD_OUT_PERCENT else "train"


@lru_cache(maxsize=MAX_CACHED)
def minhash(prompt: str) -> int:
    """The MinHash signature of a prompt: 64 values of 4 bits in one integer."""
    words = normalized(prompt).split()[:MAX_WORDS]
    grams = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    hashes = [
        int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=7).digest(), "big")
        for gram in grams
    ]
    signature = 0
    for factor, offset in _FACTORS:
        signature = signature << 4 | min((factor * h + offset) % _PRIME for h in hashes) & 15
    return signature


def similarity(one: int, other: int) -> float:
    """The estimated Jaccard similarity of two signatures."""
    differing = one ^ other
    differing |= differing >> 2
    differing |= differing >> 1
    equal = 1.0 - (differing & _LOW_BITS).bit_count() / _PERMUTATIONS
    # Of different values, 1 in 16 agrees in its 4 bits.
    return (equal - 1 / 16) / (15 / 16)


def sketch(prompts: Iterable[str]) -> dict[str, Any]:
    """A record of `prompts` without their text; at most MAX_RECORDED of them."""
    by_digest = {digest_of_prompt(prompt): prompt for prompt in prompts}
    recorded = sorted(by_digest)[:MAX_RECORDED]
    data = b"".join(
        digest.to_bytes(8, "big") + minhash(by_digest[digest]).to_bytes(_RECORD_BYTES - 8, "big")
        for digest in recorded
    )
    return {
        "form": FORM,
        "distinct": len(by_digest),
        "recorded": len(recorded),
        "data": base64.b64encode(data).decode(),
    }


@dataclass(frozen=True)
class UsedPrompts:
    """Recorded prompts of one use, by digest; `complete`: all of them were recorded."""

    signatures: Mapping[int, int]
    complete: bool

    def matches(self, prompt: str) -> Literal["exact", "near", ""]:
        """How `prompt` was used: itself up to normalization, a near-duplicate, or not at all."""
        if digest_of_prompt(prompt) in self.signatures:
            return "exact"
        own = minhash(prompt)
        if any(similarity(own, used) >= MIN_JACCARD for used in self.signatures.values()):
            return "near"
        return ""


def read_sketches(data_records: Iterable[Any]) -> UsedPrompts | None:
    """The used prompts in records of data sets (`Dataset.record()`); None if one records none.

    Records come from files: anything else than what `sketch` writes counts as not recorded.
    """
    signatures: dict[int, int] = {}
    complete = True
    for record in data_records:
        found = record.get("prompts") if isinstance(record, dict) else None
        if not isinstance(found, dict) or found.get("form") != FORM:
            return None
        try:
            data = base64.b64decode(found["data"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error):
            return None
        if len(data) % _RECORD_BYTES or len(data) > MAX_RECORDED * _RECORD_BYTES:
            return None
        for start in range(0, len(data), _RECORD_BYTES):
            one = data[start : start + _RECORD_BYTES]
            signatures[int.from_bytes(one[:8], "big")] = int.from_bytes(one[8:], "big")
        complete &= found.get("distinct") == len(data) // _RECORD_BYTES
    return UsedPrompts(signatures, complete)


def without_sketches(record: Any) -> Any:
    """A copy of a JSON value with every sketch replaced by the number of its prompts."""
    if isinstance(record, Mapping):
        if record.get("form") == FORM:
            return f"{record.get('recorded')} of {record.get('distinct')} recorded as digests"
        return {key: without_sketches(value) for key, value in record.items()}
    if isinstance(record, Sequence) and not isinstance(record, str):
        return [without_sketches(value) for value in record]
    return record
