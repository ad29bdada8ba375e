"""Charts as SVG, drawn for a page that gives the colours: ``.s0``, ``.s1``, … are the lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 28
POINTS = 240
"""The most of one line; a longer run is averaged."""
SERIES = 8
"""Colours that the page has."""

Point = tuple[float, float]


class Line(NamedTuple):
    name: str
    points: Sequence[Point]
    """Ascending by x. A y of NaN leaves a gap."""
    notes: Sequence[str] = ()
    """What each point says when it is pointed at."""


class Axis(NamedTuple):
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def percentile_curve(lines: Sequence[tuple[str, int, Sequence[tuple[float, float]]]]) -> str:
    """Times in ms over percentiles, each nine as wide as the one before; both axes logarithmic.

    Of each line the name, the count of values, and the curve, whose last point is the maximum.
    """
    drawn = [
        Line(
            name,
            [(_nines(percent, count), max(value, 0.001)) for percent, value in curve],
            [f"{name}: {_percentile(percent)} {milliseconds(value)}" for percent, value in curve],
        )
        for name, count, curve in lines
    ]
    far = max((x for line in drawn for x, _ in line.points), default=2.0)
    across = Axis(
        0,
        max(far, 2.0),
        [
            (_nines(percent, 0), f"{percent:g}")
            for percent in (0, 50, 90, 99, 99.9, 99.99, 99.999)
            if _nines(percent, 0) <= max(far, 2.0)
        ],
    )
    return _plot(drawn, across, _decades([y for line in drawn for _, y in line.points]), _log)


def over_time(lines: Sequence[Line], load: tuple[float, float] | None, unit: str = "") -> str:
    """Any figure over the seconds of a run; ``load`` is the stretch to be shaded."""
    thin = [Line(line.name, _thinned(line.points)) for line in lines]
    noted = [
        Line(
            line.name,
            line.points,
            [f"{line.name}: {y:,.4g}{unit} at {x:.0f} s" for x, y in line.points],
        )
        for line in thin
    ]
    last = max((x for line in thin for x, _ in line.points), default=1.0)
    highest = max((y for line in thin for _, y in line.points if not math.isnan(y)), default=1.0)
    step = _step(last, 6)
    across = Axis(0, max(last, 1), [(x, f"{x:g} s") for x in _steps(step, last)])
    step = _step(highest or 1.0, 4)
    top = math.ceil((highest or 1.0) / step) * step
    up = Axis(0, top, [(y, f"{_short(y)}{unit}") for y in _steps(step, top)])
    return _plot(noted, across, up, lambda y: y, load)


def milliseconds(value: float) -> str:
    return f"{value / 1000:,.3g} s" if value >= 1000 else f"{value:.3g} ms"


# -- drawing ----------------------------------------------------------------------------------


def _plot(
    lines: Sequence[Line],
    across: Axis,
    up: Axis,
    scale: Callable[[float], float],
    band: tuple[float, float] | None = None,
) -> str:
    low, high = scale(up.low), scale(up.high)

    def x_of(x: float) -> float:
        share = (x - across.low) / (across.high - across.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    if band is not None:
        left, right = x_of(band[0]), x_of(min(band[1], across.high))
        parts.append(
            f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{max(0, right - left):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/>'
        )
    for y, label in up.ticks:
        at = y_of(y)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for x, label in across.ticks:
        parts.append(
            f'<text x="{x_of(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'
        )
    for number, line in enumerate(lines):
        parts += _drawn(line, number % SERIES, x_of, y_of)
    return "".join([*parts, "</svg>"])


def _drawn(
    line: Line, number: int, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> Iterator[str]:
    path, pen = [], "M"
    for x, y in line.points:
        if math.isnan(y):
            pen = "M"
        else:
            path.append(f"{pen}{x_of(x):.1f} {y_of(y):.1f}")
            pen = "L"
    if not path:
        return
    yield f'<path class="line s{number}" d="{"".join(path)}"/>'
    for (x, y), note in zip(line.points, line.notes, strict=True):
        if not math.isnan(y):
            yield (
                f'<circle class="s{number}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3">'
                f"<title>{escape(note)}</title></circle>"
            )


def _nines(percent: float, count: int) -> float:
    """Where a percentile stands: 0 for 0, 1 for 90, 2 for 99; the maximum in mid-rank."""
    if percent >= 100:
        return math.log10(2 * max(count, 1))
    return -math.log10(1 - percent / 100)


def _percentile(percent: float) -> str:
    return "max" if percent >= 100 else f"p{percent:g}"


def _log(y: float) -> float:
    return math.log10(y)


def _decades(values: Sequence[float]) -> Axis:
    low = math.floor(math.log10(min(values, default=1.0)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=10.0))))
    return Axis(
        10.0**low, 10.0**high, [(10.0**n, milliseconds(10.0**n)) for n in range(low, high + 1)]
    )


def _step(length: float, most: int) -> float:
    """A round distance of which at most so many fit."""
    rough = length / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= rough - 1e-12)


def _steps(step: float, last: float) -> list[float]:
    return [step * n for n in range(int(last / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Averages of neighbours, so that there are not too many."""
    size = -(-len(points) // POINTS)
    thin = []
    for at in range(0, len(points), max(size, 1)):
        group = points[at : at + size]
        ys = [y for _, y in group if not math.isnan(y)]
        thin.append((group[0][0], sum(ys) / len(ys) if ys else math.nan))
    return thin
