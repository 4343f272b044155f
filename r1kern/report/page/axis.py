"""Scales and their ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1kern.report.page.text import digits


@dataclass(frozen=True)
class Axis:
    """Values [low, high] on pixels [start, end], linear or by decades.

    Attributes:
        ticks: values that are labelled.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False
    percent: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else self.span
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    @property
    def span(self) -> tuple[float, float]:
        return self.low, self.high

    def label(self, tick: float) -> str:
        if self.log:
            return f"1e{round(math.log10(tick))}"
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick) or 1.0
        if self.percent:
            return f"{100 * tick:.{digits(100 * step)}f}"
        if max(abs(self.low), abs(self.high)) >= 1e4:
            return _with_prefix(tick, step)
        if step < 1e-3 and max(abs(self.low), abs(self.high)) < 1e-2:
            return "0" if tick == 0 else f"{tick:.{_mantissa(tick, step)}e}".replace("e-0", "e-")
        return f"{tick:.{digits(step)}f}"


def _with_prefix(tick: float, step: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(tick) >= factor:
            return f"{tick / factor:.{digits(step / factor)}f}{prefix}"
    return f"{tick:.{digits(step)}f}"


def _mantissa(tick: float, step: float) -> int:
    return max(0, math.floor(math.log10(abs(tick))) + digits(step))


def linear(
    low: float, high: float, start: float, end: float, *, ticks: int = 5, percent: bool = False
) -> Axis:
    """From `low` to `high`, widened to round ticks; differences of less than 1 ‰ look flat."""
    least = 1e-3 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    step = nice((high - low) / ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(i * step for i in range(first, last + 1))
    return Axis(marks[0], marks[-1], start, end, marks, percent=percent)


def steps(low: int, high: int, start: float, end: float, *, ticks: int = 5) -> Axis:
    """Whole numbers, not widened: the plot begins and ends with the data."""
    if high <= low:
        return Axis(low - 1, low + 1, start, end, (low,))
    step = max(1, round(nice((high - low) / ticks)))
    marks = tuple(range(-(-low // step) * step, high + 1, step))
    return Axis(low, high, start, end, marks)


def decades(low: float, high: float, start: float, end: float) -> Axis:
    """Powers of ten around two positive values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = -(-(last - first) // 6)
    marks = tuple(10.0**e for e in range(first, last + 1, every))
    return Axis(10.0**first, 10.0**last, start, end, marks, log=True)


def nice(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `step`."""
    decade = 10 ** math.floor(math.log10(step))
    return next((decade * m for m in (1, 2, 5) if decade * m >= step * (1 - 1e-9)), decade * 10)
