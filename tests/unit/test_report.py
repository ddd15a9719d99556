"""Figures of the report that need no run."""

from __future__ import annotations

from jobs.report import engines


def test_the_report_names_every_engine_that_built_a_table() -> None:
    built = [("events", "spark"), ("sequences", "spark"), ("sequences", "sail")]
    partitions = [{"table": t, "engine": e} for t, e in (*built, ("user_embeddings", "torch"))]
    assert engines(partitions) == ["sail", "spark"]
