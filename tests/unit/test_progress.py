"""What a person sees of a run: changes once, what is running now and then, a table on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from feature_store import datasets
from jobs.local import progress
from jobs.local.client import TaskRun
from jobs.local.plan import DONE, FAILED, Plan

PLAN = Plan(datasets.get("simulated"), ("2024-03-01", "2024-03-02"))
INGEST, FEATURES = PLAN.dag_ids[:2]


def task(state: str, *, attempt: int = 1, seconds: float | None = None) -> TaskRun:
    return TaskRun(
        dag_id=INGEST, run_id="r", task_id="ingest", state=state, attempt=attempt, seconds=seconds
    )


def test_each_change_of_a_task_is_a_line_and_a_repetition_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = progress.Progress(PLAN, terminal=False)
    for seen in (task("queued"), task("running"), task("running"), task("success", seconds=2.5)):
        shown.task("2024-03-01", seen)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "2024-03-01  ingest/ingest" in lines[0] and "running" in lines[0]
    assert "done" in lines[1] and "2.5 s" in lines[1]


def test_a_second_attempt_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.Progress(PLAN, terminal=False)
    shown.task("2024-03-01", task("up_for_retry"))
    shown.task("2024-03-01", task("running", attempt=2))
    out = capsys.readouterr().out
    assert "will be tried again" in out and "(attempt 2)" in out


def test_after_a_silence_it_says_what_is_running(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0)
    shown = progress.Progress(PLAN, terminal=False)
    shown.task("2024-03-01", task("running"))
    shown.pairs({(INGEST, "2024-03-02"): DONE}, {})
    last = capsys.readouterr().out.splitlines()[-1]
    tasks = 2 * sum(len(stage.steps) for stage in PLAN.stages)
    assert "running: 2024-03-01 ingest/ingest" in last and f"1 of {tasks} tasks done" in last


def test_the_tasks_that_are_done_are_counted_as_the_lines_show_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = progress.Progress(PLAN, terminal=False)
    dag_id, steps = PLAN.stages[2].dag_id, PLAN.stages[2].steps
    for step in steps[:2]:
        seen = replace(task("success", seconds=1.0), dag_id=dag_id, task_id=step.name)
        shown.task("2024-03-01", seen)
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0)
    for states, done in (({}, 2), ({(dag_id, "2024-03-02"): DONE}, 2 + len(steps))):
        shown.pairs(states, {})
        assert f"{done} of" in capsys.readouterr().out
    assert len(lines) == 2


def test_the_table_has_a_row_for_each_day_and_says_what_cannot_come() -> None:
    shown = progress.Progress(PLAN, terminal=False)
    shown.pairs({(INGEST, "2024-03-01"): DONE, (FEATURES, "2024-03-01"): FAILED}, {})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(shown._table())
    text = console.export_text()
    assert "2024-03-01" in text and "2024-03-02" in text
    assert "failed" in text and "cannot come" in text
