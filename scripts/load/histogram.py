"""A high-dynamic-range histogram: times of any length, in little memory, with one bound of error.

A value is counted under its first 11 binary digits, as HdrHistogram does for three decimal ones:
what is read back is never too low and at most 1/1024 too high, from microseconds to hours, in a
few thousand counters. Histograms add up, over processes as over seconds.

The package ``hdrhistogram`` does the same. It has no wheel for Linux on ARM, where
``scripts/setup`` would then need a compiler, and it brings setuptools along.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

DIGITS = 11
CURVE = (0, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99, 99.995, 99.999)
"""Percentiles that a curve is drawn through, as far as there are values enough to tell them."""


class Histogram:
    """Counts of values, which are whole microseconds."""

    __slots__ = ("_counts", "count", "highest", "total")

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0
        self.total = 0
        self.highest = 0
        self.record_all(values)

    def __repr__(self) -> str:
        return f"<Histogram count={self.count} highest={self.highest}>"

    def record(self, value: int, times: int = 1) -> None:
        """A value below 0 counts as 0."""
        value = max(value, 0)
        shift = value.bit_length() - DIGITS
        self._counts[value >> shift << shift if shift > 0 else value] += times
        self.count += times
        self.total += value * times
        self.highest = max(self.highest, value)

    def record_all(self, values: Iterable[int]) -> None:
        for value, times in Counter(values).items():
            self.record(value, times)

    def add(self, other: Histogram) -> None:
        self._counts.update(other._counts)
        self.count += other.count
        self.total += other.total
        self.highest = max(self.highest, other.highest)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def percentiles(self, *wanted: float) -> list[int]:
        """The values that so many percent of all do not exceed; ``wanted`` ascends.

        Zeros if nothing was recorded.
        """
        found = []
        passed = 0
        keys = iter(sorted(self._counts))
        key = 0
        for percent in wanted:
            # Less a billionth: 99.9 % of 1,000 values are 999, whatever the doubles say.
            rank = max(1, math.ceil(percent / 100 * self.count - 1e-9))
            while passed < rank and self.count:
                key = next(keys)
                passed += self._counts[key]
            found.append(min(_last_of(key), self.highest))
        return found

    def curve(self) -> list[tuple[float, int]]:
        """Percentiles with their values, up to the last that differs from the maximum's rank."""
        told = [percent for percent in CURVE if self.count * (100 - percent) >= 100]
        return [*zip(told, self.percentiles(*told), strict=True), (100.0, self.highest)]


def _last_of(key: int) -> int:
    """The highest value that is counted under ``key``."""
    shift = key.bit_length() - DIGITS
    return key + (1 << shift) - 1 if shift > 0 else key
