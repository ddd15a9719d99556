"""How the report looks: a page with plots, and a table for the terminal. The figures are `jobs/report.py`'s."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.table import Table

from jobs.text import days_text, interval, number, percent
from jobs.training.plots import ne_by_day

TEMPLATE = Path(__file__).with_name("report.html.j2")


def difference(arm: Mapping[str, Any], other: str) -> str:
    """NE of an arm less that of `other`, with its interval; nothing of an arm to itself."""
    return "" if arm["name"] == other else interval(arm[f"to_{other}"])


def svg(figure: Figure) -> str:
    """A figure as an SVG element to put into the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _blank(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def arms_figure(task: Mapping[str, Any]) -> Figure:
    """NE of each arm on each test day, against the base rate and, where known, the truth."""
    figure, axes = _blank(6.0, 4.2)
    days = task["days"]
    for arm in task["arms"]:
        values = [arm["by_day"].get(day) for day in days]
        axes.plot(days, values, marker="o", markersize=4, label=arm["title"])
    axes.axhline(1.0, color="gray", linestyle="--", linewidth=1, label="base rate")
    if task["oracle"] and task["oracle"]["ne"] is not None:
        axes.axhline(task["oracle"]["ne"], color="black", linestyle=":", linewidth=1, label="truth")
    axes.set_ylabel("NE (lower is better)")
    axes.tick_params(axis="x", labelsize=8, rotation=30)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, ncols=2, loc="outside lower center")
    return figure


def upstream_figures(
    series: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]],
) -> list[Figure]:
    """Per task: NE by day of each upstream model (`series[task][model]` is (day, NE) pairs)."""
    return [
        ne_by_day(models, title=f"{task}: progressive NE by day") for task, models in series.items()
    ]


def drift_figure(embeddings: Sequence[Mapping[str, Any]]) -> Figure:
    """Cosine between consecutive days' embeddings, raw and pooled, by model."""
    figure, axes = _blank(11.0, 3.2)
    for model in sorted({e["model"] for e in embeddings}):
        rows = [e for e in embeddings if e["model"] == model and e["cosine_raw"] is not None]
        days = [e["ds"] for e in rows]
        line = axes.plot(
            days,
            [e["cosine_pooled"] for e in rows],
            marker="o",
            markersize=4,
            label=f"{model}, pooled",
        )
        raw = [e["cosine_raw"] for e in rows]
        colour = line[0].get_color()
        axes.plot(days, raw, marker=".", linestyle="--", color=colour, label=f"{model}, raw")
    axes.set_ylabel("mean cosine to the day before")
    axes.set_ylim(top=1.02)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure


def html(report: Mapping[str, Any]) -> str:
    """The page. It is one file: styles and plots are inside."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        num=number, percent=percent, interval=interval, difference=difference, days_text=days_text
    )
    page = dict(report)
    page["tasks"] = [
        {**t, "figure": Markup(svg(arms_figure(t))) if t["arms"] else ""} for t in report["tasks"]
    ]
    page["upstream_figures"] = [Markup(svg(f)) for f in upstream_figures(report["upstream_by_day"])]
    page["drift_figure"] = Markup(svg(drift_figure(report["embeddings"])))
    return environment.from_string(TEMPLATE.read_text()).render(r=page)


def terminal(report: Mapping[str, Any]) -> list[Table]:
    """A table per task for the terminal."""
    tables = []
    for task in report["tasks"]:
        kind = (
            " (simulated)"
            if report["simulated"]
            else " (sampled metric)"
            if task["sampled"]
            else ""
        )
        if not task["arms"]:
            table = Table(title=f"{task['name']}{kind}: {task['why_not']}")
            tables.append(table)
            continue
        table = Table(
            title=f"{task['name']}{kind}: {task['targets']:,} targets, {days_text(task['days'])}",
            title_justify="left",
        )
        table.add_column("inputs", no_wrap=True)
        for name in ("NE", "AUC", "NE to context and item", "NE to + aggregates"):
            table.add_column(name, justify="right", no_wrap=True)
        if task["oracle"]:
            table.add_column("attainable", justify="right")
        for arm in task["arms"]:
            row = [arm["title"], number(arm["ne"]), number(arm["auc"], 3)]
            row += [difference(arm, "context"), difference(arm, "aggregates")]
            if task["oracle"]:
                row.append(percent(arm["attainable"], missing="–"))
            table.add_row(*row, style="bold" if arm["best"] else None)
        tables.append(table)
    return tables
