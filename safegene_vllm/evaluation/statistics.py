"""Rates of yes/no values with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safegene_vllm.errors import ConfigError

_LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Rate:
    """A share of `n` in 0..1, or a difference of two in -1..1, with its 95 % interval."""

    rate: float
    low: float
    high: float
    n: int


def rate(values: Sequence[bool], *, seed: int = 0, resamples: int = 2000) -> Rate:
    """The share of True with its 95 % percentile bootstrap interval (Efron 1979).

    The share in a resample of n yes/no values is Binomial(n, rate) / n, drawn as such. An interval
    of width 0 at 0 or 1 means that nothing else was observed, not that nothing else can happen.
    Errors: ConfigError without values.
    """
    n = len(values)
    if n == 0:
        raise ConfigError("a rate of no values; expected at least one")
    share = sum(map(bool, values)) / n
    draws = np.random.default_rng(seed).binomial(n, share, size=resamples) / n
    low, high = np.percentile(draws, _LEVELS)
    return Rate(share, float(low), float(high), n)


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], *, seed: int = 0, resamples: int = 2000
) -> Rate:
    """The share after minus the share before, on the same n prompts in the same order, -1..1.

    Whole pairs are resampled, so prompts that never change add no uncertainty. A resample of pairs
    that gain, lose or stay is Multinomial(n, their shares). Errors: ConfigError without values, or
    if the two are not of one length.
    """
    n = len(before)
    if n == 0 or len(after) != n:
        raise ConfigError(
            f"{n} values before and {len(after)} after; expected the same prompts, at least one"
        )
    pairs = list(zip(before, after, strict=True))
    gained = sum(bool(a) and not b for b, a in pairs)
    lost = sum(bool(b) and not a for b, a in pairs)
    shares = [gained / n, lost / n, (n - gained - lost) / n]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / n, _LEVELS)
    return Rate((gained - lost) / n, float(low), float(high), n)
