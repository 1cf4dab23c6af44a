"""Geometry of the small charts on a run's page; the template draws them as SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 46, 8, 8, 20
#: More points than this are drawn as the lowest and the highest of each of half as many stretches.
MOST_POINTS = 600

Points = Sequence[tuple[int, float]]


def number(value: float) -> str:
    """A number in four digits at most, with a true minus sign."""
    text = f"{value:.4g}" if abs(value) < 1e4 or abs(value) >= 1e6 else f"{value:,.0f}"
    text = re.sub(r"e([+-])0*(\d)", lambda found: "e" + found[1].replace("+", "") + found[2], text)
    return text.replace("-", "−")


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """At most `most` round numbers from `low` to `high`, in equal steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [k * step for k in range(first, last + 1)]
    return [low, high]


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Points in which no peak is lost: all, or the lowest and the highest of each stretch, and the first and the last."""
    if len(points) <= most:
        return list(points)
    stretches, kept = most // 2, {0, len(points) - 1}
    for k in range(stretches):
        part = range(k * len(points) // stretches, (k + 1) * len(points) // stretches)
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def line_chart(name: str, lines: Mapping[str, Points]) -> dict[str, Any]:
    """A chart of values against steps.

    Args:
        name: its heading.
        lines: points (step, value) by the line's name, none of them empty; steps need not be sorted.

    Returns:
        `name`, `lines` (`name`, `path` for an SVG path, `dots` where a line has a single point, `points` as drawn, `last` as text),
        `x_ticks` and `y_ticks` (position and text), and `thinned`, whether not every point is drawn.
    """
    everything = [point for points in lines.values() for point in points]
    steps, values = [step for step, _ in everything], [value for _, value in everything]
    low_x, high_x, low, high = min(steps), max(steps), min(values), max(values)
    # A flat line stands in the middle; a difference too small or too large for floating point counts as flat.
    room = (high - low) * 0.06 if high > low and math.isfinite(high - low) else abs(low) * 0.1 or 1.0
    low, high = low - room, high + room
    if not (math.isfinite(high - low) and high > low):
        low, high = min(values) / 2 - 1, max(values) / 2 + 1

    def x(step: float) -> float:
        share = (step - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for label, points in lines.items():
        shown = thinned(sorted(points))
        places = [(x(step), y(value)) for step, value in shown]
        drawn.append(
            {
                "name": label,
                "path": "M" + " L".join(f"{a} {b}" for a, b in places),
                "dots": places if len(places) == 1 else [],
                "points": [
                    [step, float(f"{value:.5g}"), *place] for (step, value), place in zip(shown, places, strict=True)
                ],
                "last": number(shown[-1][1]),
            }
        )
    return {
        "name": name,
        "lines": drawn,
        "x_ticks": [(x(step), f"{step:,}") for step in sorted({low_x, high_x})],
        "y_ticks": [(y(value), number(value)) for value in ticks(low, high)],
        "thinned": any(len(points) > MOST_POINTS for points in lines.values()),
    }


#: Charts that are shown at once, in this order; the others are folded away.
FIRST = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards",
    "mean_token_accuracy",
    "learning_rate",
    "grad_norm",
)


def training_charts(series: Mapping[str, Points]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Charts of what a Trainer logged, and further ones: chosen beside rejected, evaluation beside training."""
    charts: dict[str, dict[str, Points]] = {}
    for name, points in series.items():
        evaluation = name.startswith("eval_")
        plain = name.removeprefix("eval_")
        side = re.fullmatch(r"(.+)/(chosen|rejected)(_\w+)?", plain)
        chart, line = (side[1] + (side[3] or ""), side[2]) if side else (plain, "train")
        if evaluation:
            line = f"{line}, eval" if side else "eval"
        charts.setdefault(chart, {})[line] = points
    order = [name for name in FIRST if name in charts] + [name for name in charts if name not in FIRST]
    made = {name: line_chart(name, charts[name]) for name in order}
    return [made[name] for name in order if name in FIRST], [made[name] for name in order if name not in FIRST]


def histogram_bars(column: Mapping[str, Any], sides: Sequence[str]) -> dict[str, Any]:
    """Bars of a column's histogram (`align.report.column_summary`): the first side upwards, the second one down.

    Heights are shares of the side's tokens, on a square-root scale, or rare values could not be seen.
    """
    counts = [column["histogram"][side] for side in sides]
    totals = [sum(each) for each in counts]
    peak = max(max(each) / (total or 1) for each, total in zip(counts, totals, strict=True)) or 1.0
    n, low, high = len(counts[0]), column["low"], column["high"]
    half, step, bars = 52, WIDTH / len(counts[0]), []
    for down, (each, total) in enumerate(zip(counts, totals, strict=True)):
        for k, count in enumerate(each):
            height = half * math.sqrt(count / (total or 1) / peak)
            start, end = low + (high - low) * k / n, low + (high - low) * (k + 1) / n
            bars.append(
                {
                    "x": round(k * step + 1, 1), "y": round(18 + half + 1 if down else 17 + half - height, 1),
                    "width": round(step - 2, 1), "height": round(height, 1), "down": bool(down),
                    "text": f"{number(start)} to {number(end)}: {100 * count / (total or 1):.1f} % of {sides[down]} ({count:,})",
                }
            )  # fmt: skip
    below = "≤ " if column["clipped"] else ""
    above = "≥ " if column["clipped"] else ""
    return {
        "name": column["name"], "meaning": column["meaning"], "bars": bars, "middle": 17 + half + 0.5,
        "height": 18 + half * len(sides) + 20, "totals": list(zip(sides, totals, strict=True)),
        "low": below + number(low), "high": above + number(high), "mid": number((low + high) / 2),
    }  # fmt: skip
