"""Plots of a run that a person can read, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from models.metrics import calibration_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ne_by_day(
    series: Mapping[str, Sequence[tuple[str, float]]], *, title: str, note: str = ""
) -> Figure:
    """Normalized entropy by day, one line per name, against the base rate's (1 by definition).

    Args:
        series: name -> (day, NE), in any order.
        title: of the plot.
        note: a line under it (say, that metrics are sampled).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    axes = figure.subplots()
    days = sorted({day for points in series.values() for day, _ in points})
    place = {day: i for i, day in enumerate(days)}
    for name, points in series.items():
        known = sorted((place[d], v) for d, v in points if np.isfinite(v))
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=name)
    axes.axhline(1.0, color="gray", linestyle="--", linewidth=1, label="base rate")
    axes.set_xticks(range(len(days)), days, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("normalized entropy (lower is better)")
    axes.set_title(title, fontsize=11)
    if note:
        axes.set_xlabel(note, fontsize=8)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def calibration(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str, bins: int = 10
) -> Figure:
    """Observed share of positives by predicted probability, in bins of equal size.

    Args:
        curves: name -> (labels, predictions), (n,) each.
        title: of the plot.
        bins: points of a curve, at most.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 5.0), layout="constrained")
    axes = figure.subplots()
    top, low = 0.0, 1.0
    for name, (labels, predictions) in curves.items():
        curve = calibration_curve(labels, predictions, bins=bins)
        predicted, observed = curve.predicted, curve.observed
        axes.plot(
            predicted, observed, marker="o", markersize=4, label=f"{name} (n={len(labels):,})"
        )
        top = max([top, *predicted, *observed])
        low = min([low, *(x for x in (*predicted, *observed) if x > 0)])
    top = top or 1.0
    axes.plot([low, top], [low, top], color="gray", linestyle="--", linewidth=1, label="calibrated")
    if top > 20 * low:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("predicted")
    axes.set_ylabel("observed")
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def ne_differences(
    rows: Sequence[tuple[str, float, float, float]], *, title: str, reference: str
) -> Figure:
    """NE differences with their intervals.

    Args:
        rows: (arm, difference, low, high); below 0 is better than the reference.
        title: of the plot.
        reference: the arm that the others are compared with.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (_, value, low, high) in enumerate(reversed(rows)):
        axes.errorbar(
            value, i, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt="o", capsize=3
        )
    axes.axvline(0.0, color="gray", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [r[0] for r in reversed(rows)], fontsize=8)
    axes.set_xlabel(f"NE minus that of '{reference}', 95% interval (left is better)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, axis="x")
    return figure
