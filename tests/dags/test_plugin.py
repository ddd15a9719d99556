"""The mapper that makes a day wait for the day before it, and the operator that runs a job."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.days import add_days
from feature_store.errors import DataError


@given(st.dates(min_value=date(1990, 1, 1)).map(str))
def test_the_day_before_feeds_the_day(day: str) -> None:
    from headwater_plugin import DayMapper

    assert DayMapper(1).to_downstream(add_days(day, -1)) == day


@pytest.mark.parametrize(
    ("key", "fed"), [("2024-02-28", "2024-02-29"), ("2023-12-31", "2024-01-01")]
)
def test_months_and_years_end(key: str, fed: str) -> None:
    from headwater_plugin import DayMapper

    assert DayMapper(1).to_downstream(key) == fed


@pytest.mark.parametrize("key", ["None", "", "2024-13-01", "2024-01-01T00:00:00"])
def test_a_key_that_is_no_day_is_refused(key: str) -> None:
    from headwater_plugin import DayMapper

    with pytest.raises(DataError, match="partition key"):
        DayMapper(1).to_downstream(key)


def test_the_mapper_survives_serialization_of_its_dag() -> None:
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization
    from headwater_plugin import DayMapper

    root = Path(__file__).resolve().parents[2]
    dag = DagBag(str(root / "dags" / "upstream.py")).dags["simulated_upstream"]
    again = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    mapper = again.timetable.get_partition_mapper(name="simulated.models")
    assert mapper.to_downstream("2024-02-29") == "2024-03-01"
    same_day = again.timetable.get_partition_mapper(name="simulated.examples")
    assert same_day.to_downstream("2024-02-29") == "2024-02-29"
    assert DayMapper.deserialize(DayMapper(1, "a launch").serialize()).launch == "a launch"


def operator(code: str, *, day: str = "2024-05-01") -> Any:
    from headwater_job import JobOperator

    return JobOperator(task_id="job", command=[sys.executable, "-c", code], day=day)


def test_a_job_that_succeeds_succeeds() -> None:
    operator("print('done')").execute({})


def test_a_user_error_fails_at_once_with_the_jobs_last_error_line() -> None:
    from airflow.sdk.exceptions import AirflowFailException

    code = "import sys; print('error: first'); print('error: mend this'); print('bye'); sys.exit(2)"
    with pytest.raises(AirflowFailException, match=r"^error: mend this$"):
        operator(code).execute({})


def test_another_exit_code_is_tried_again_and_says_how_it_ended() -> None:
    from airflow.sdk.exceptions import AirflowFailException
    from headwater_job import JobFailed

    with pytest.raises(JobFailed, match="exit code 1; last output: ValueError: boom") as caught:
        operator("raise ValueError('boom')").execute({})
    assert not isinstance(caught.value, AirflowFailException)


def test_a_killed_job_names_the_signal() -> None:
    from headwater_job import JobFailed

    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(JobFailed, match=r"SIGKILL \(out of memory\?\)"):
        operator(code).execute({})


@pytest.mark.parametrize("day", ["None", "", "2024-5-1"])
def test_a_run_without_a_day_as_its_key_runs_nothing(day: str, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    trace = tmp_path / "ran"
    with pytest.raises(AirflowFailException, match="partition key"):
        operator(f"open({str(trace)!r}, 'w')", day=day).execute({})
    assert not trace.exists()


def test_output_that_is_not_text_does_not_fail_a_job() -> None:
    operator("import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\n')").execute({})


def test_a_job_that_takes_too_long_is_ended_whatever_it_does_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import headwater_job
    import psutil
    from airflow.sdk.execution_time.timeout import timeout

    monkeypatch.setattr(headwater_job, "STOP_SECONDS", 0.1)
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    job = operator(code)
    with pytest.raises(headwater_job.JobFailed, match=r"took longer than .*TASK_HOURS"), timeout(2):
        job.execute({})
    assert not psutil.pid_exists(job._process.process.pid)
