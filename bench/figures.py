"""What is made of samples: percentiles, a straight line through them, and tables to read them in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` (0-1) of all samples do not exceed (nearest rank).

    `ordered` ascends and is not empty.
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Summary:
    """Percentiles of one set of samples, in the samples' own unit."""

    count: int
    p50: float
    p90: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise at least one sample, in any order."""
        ordered = sorted(samples)
        return cls(
            len(ordered), percentile(ordered, 0.50), percentile(ordered, 0.90), percentile(ordered, 0.99), ordered[-1]
        )

    def scaled(self, factor: float) -> Summary:
        """The same figures in another unit."""
        return Summary(self.count, self.p50 * factor, self.p90 * factor, self.p99 * factor, self.maximum * factor)


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through samples (least squares): its value at the first and at the last of them."""

    start: float
    end: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Trend:
        """Fit at least one sample; the samples are evenly spaced."""
        middle = (len(samples) - 1) / 2
        mean = sum(samples) / len(samples)
        spread = sum((place - middle) ** 2 for place in range(len(samples)))
        lean = sum((place - middle) * (sample - mean) for place, sample in enumerate(samples))
        rise = lean / spread * middle if spread else 0.0
        return cls(mean - rise, mean + rise)

    @property
    def growth(self) -> float:
        """How much the line rises from the first sample to the last, in the samples' unit."""
        return self.end - self.start


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
