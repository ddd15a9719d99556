"""Plots of a run that a person can read, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from models.metrics import calibration_curve


def ne_by_day(
    series: Mapping[str, Sequence[tuple[str, float]]], *, title: str, note: str = ""
) -> Figure:
    """Normalized entropy by day, one line per name, against the base rate's (1 by definition).

    Args:
        series: name -> (day, NE), in any order.
        title: of the plot.
        note: a line under it (say, that metrics are sampled).
    """
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


Row = tuple[str, float, float, float]


def ne_differences(panels: Mapping[str, Sequence[Row]], *, title: str, axis: str) -> Figure:
    """NE differences with their intervals; left of 0 is better.

    Args:
        panels: title of a panel -> (name, difference, low, high) of each row; the same names in all.
        title: of the plot.
        axis: what the differences are.
    """
    names = [name for name, *_ in next(iter(panels.values()))]
    figure = Figure(figsize=(4.5 + 3 * len(panels), 1.4 + 0.4 * len(names)), layout="constrained")
    many = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, rows) in zip(many, panels.items(), strict=True):
        for i, (_, value, low, high) in enumerate(rows):
            around = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(value, i, xerr=around, fmt="o", capsize=3)
        axes.axvline(0.0, color="gray", linestyle="--", linewidth=1)
        axes.set_title(panel, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(alpha=0.3, axis="x")
    many[0].set_yticks(range(len(names)), names, fontsize=8)
    many[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(f"{axis}, 95% interval (left is better)", fontsize=9)
    return figure
