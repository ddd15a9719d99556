"""The shell around a job: what it refuses, and the exit code that an orchestrator sees."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from feature_store import datasets
from feature_store.errors import DataError, QualityError, SpecError
from feature_store.spec import Attribute, Dataset, EventStream, GivenLabel, Target, Task
from jobs import context as shell
from jobs.context import JobContext
from jobs.settings import Settings

DATASET = Dataset(
    name="tiny",
    first_day="2024-05-01",
    streams=(EventStream(name="clicks", attributes=(Attribute(name="page"),), max_events=5),),
    targets=(Target(name="shown"),),
    tasks=(Task(name="click", label=GivenLabel(column="clicked"), targets=("shown",)),),
)
ARGV = ["--dataset", "tiny", "--ds", "2024-05-02"]


def context(**changes: object) -> JobContext:
    given = {"dataset": DATASET, "ds": "2024-05-02", "settings": Settings.from_env(), **changes}
    return JobContext(**given)  # type: ignore[arg-type]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Call it with what the job `ingest` does and further arguments; gives the exit code."""
    monkeypatch.setattr(datasets, "get", lambda name: DATASET)

    def call(job: Callable[[JobContext], None], *arguments: str, argv: list[str] = ARGV) -> int:
        module = ModuleType("jobs.ingest")
        module.run = job  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "jobs.ingest", module)
        with pytest.raises(SystemExit) as ended:
            shell.main("ingest", [*argv, *arguments])
        return int(ended.value.code or 0)

    return call


@pytest.mark.parametrize("day", ["None", "", "2024-5-2", "2024-02-30", "20240502"])
def test_a_run_without_a_partition_key_is_refused(day: str) -> None:
    with pytest.raises(DataError, match="partition key"):
        context(ds=day)


def test_a_day_before_the_data_begin_is_refused() -> None:
    with pytest.raises(DataError, match="2024-04-30: tiny begins on 2024-05-01"):
        context(ds="2024-04-30")
    assert context(ds="2024-05-01").ds == "2024-05-01"


def test_an_unknown_model_or_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match="model is 'dlrm': tiny has sum, sequence"):
        context(model="dlrm")
    with pytest.raises(SpecError, match="task is 'buy': tiny has click"):
        context(task="buy")


def test_a_job_about_one_model_or_task_says_that_it_needs_one() -> None:
    with pytest.raises(SpecError, match="--model sum or --model sequence"):
        context().require_model()
    with pytest.raises(SpecError, match="--task click"):
        context().require_task()
    assert context(model="sum").require_model() == "sum"
    assert context(task="click").require_task() is DATASET.tasks[0]


def test_a_job_gets_what_the_command_line_says(ran: Callable[..., int]) -> None:
    seen: list[JobContext] = []
    code = ran(seen.append, "--model", "sum", "--task", "click", "--source", "/logs", "--full")
    assert code == 0
    got = seen[0]
    assert (got.dataset, got.ds, got.model, got.task, got.full) == (
        DATASET,
        "2024-05-02",
        "sum",
        "click",
        True,
    )
    assert str(got.source) == "/logs"


def test_the_source_of_the_environment_is_the_default(
    ran: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_SOURCE", "/elsewhere")
    seen: list[JobContext] = []
    assert ran(seen.append) == 0
    assert str(seen[0].source) == "/elsewhere"


def test_an_error_that_a_user_can_mend_is_one_line_and_exits_2(
    ran: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def job(context: JobContext) -> None:
        raise QualityError("events/2024-05-02: user_id has nulls:\n  keys 1, 2")

    assert ran(job) == 2
    assert capsys.readouterr().err == ("error: events/2024-05-02: user_id has nulls: keys 1, 2\n")


def test_the_key_of_an_airflow_run_without_one_exits_2(
    ran: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(lambda context: None, argv=["--dataset", "tiny", "--ds", "None"]) == 2
    assert "partition key" in capsys.readouterr().err


def test_any_other_error_keeps_its_traceback_and_exits_1(
    ran: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def job(context: JobContext) -> None:
        raise ZeroDivisionError("ours")

    assert ran(job) == 1
    assert "Traceback" in capsys.readouterr().err


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "make",
    [
        full_disk,
        lambda: RuntimeError(
            "Generic LocalFileSystem error: No space left on device (os error 28)"
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_sentence_and_exits_1(
    make: Callable[[], Exception],
    wrapped: bool,
    ran: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def job(context: JobContext) -> None:
        if wrapped:
            raise RuntimeError("commit failed") from make()
        raise make()

    assert ran(job) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the disk is full") and said.count("\n") == 1


def test_several_jobs_run_in_order_and_stop_at_the_first_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets, "get", lambda name: DATASET)
    done: list[str] = []
    contexts: set[int] = set()

    def module(name: str, fails: bool = False) -> None:
        def run(context: JobContext) -> None:
            done.append(name)
            contexts.add(id(context))
            if fails:
                raise DataError("bad")

        fake = ModuleType(name)
        fake.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"jobs.{name}", fake)

    module("build_sequences")
    module("build_aggregates", fails=True)
    module("build_examples")
    with pytest.raises(SystemExit) as ended:
        shell.main(None, ["build_sequences", "build_aggregates", "build_examples", *ARGV])
    assert ended.value.code == 2
    assert done == ["build_sequences", "build_aggregates"]
    assert len(contexts) == 1, "one context, and so one session, serves them all"


def test_an_unknown_job_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        shell.main(None, ["bild_examples", *ARGV])
    assert ended.value.code == 2
    assert "build_examples" in capsys.readouterr().err


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, jobs.context as c\n"
        "try: c.main(None, ['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'pyspark', 'torch', 'mlflow', 'great_expectations', 'pandas'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=shell.REPOSITORY,
    )
    assert said.stdout.strip().endswith("[]")


def test_the_code_version_is_the_commit_and_in_an_image_what_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(describe, cwd=shell.REPOSITORY, capture_output=True, text=True)
    if told.returncode == 0:
        assert shell.code_version.__wrapped__() == told.stdout.strip()
    monkeypatch.setattr(shell, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert shell.code_version.__wrapped__() == "unknown"
    monkeypatch.setenv("HEADWATER_CODE_VERSION", "v1.2")
    assert shell.code_version.__wrapped__() == "v1.2"
