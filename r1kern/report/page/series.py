"""Values over training steps, and what is done to them before they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MOST_POINTS = 400  # of one line: beyond it, bins
SMOOTHED_FROM = 40  # points; fewer are told apart by eye


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        x: training steps, rising.
        y: a value each, None where it is missing: there the line breaks.
        half: half of the 95 % interval of each value, or empty.
        low, high: least and greatest value in each bin, or empty where nothing was binned.
        bin: steps that a point is the mean of.
    """

    name: str
    x: tuple[int, ...]
    y: tuple[float | None, ...]
    half: tuple[float | None, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    bin: int = 1

    @property
    def present(self) -> list[float]:
        return [y for y in self.y if y is not None]

    @property
    def spaced(self) -> bool:
        """Measured now and then, such as an evaluation: its points are joined by eye only."""
        return bool(self.half)


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most `most` points: each the mean of a bin of equally many, with the bin's extremes."""
    if len(series.x) <= most or series.spaced:
        return series
    size = -(-len(series.x) // most)
    bins = [slice(i, i + size) for i in range(0, len(series.x), size)]
    values = [[y for y in series.y[b] if y is not None] for b in bins]
    return Series(
        series.name,
        tuple(series.x[b][-1] for b in bins),
        tuple(fmean(v) if v else None for v in values),
        low=tuple(min(v, default=None) for v in values),
        high=tuple(max(v, default=None) for v in values),
        bin=size,
    )


def window(series: Series) -> int:
    """Points that the smooth line averages over; 1: there is none."""
    count = len(series.present)
    return 1 if count < SMOOTHED_FROM or series.spaced else max(3, count // 20) | 1


def smoothed(series: Series) -> tuple[float | None, ...]:
    """Centred moving mean over `window` points, of those present; missing ones stay missing.

    Towards the ends the window shrinks on both sides, so that a straight line stays one.
    """
    half, last = window(series) // 2, len(series.y) - 1
    reach = [min(half, i, last - i) for i in range(len(series.y))]
    return tuple(
        None if y is None else _mean(series.y[i - r : i + r + 1])
        for i, (y, r) in enumerate(zip(series.y, reach, strict=True))
    )


def _mean(values: Sequence[float | None]) -> float:
    return fmean(v for v in values if v is not None)
