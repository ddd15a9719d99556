"""The report over files of its own making: what it names, and what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from feature_store.errors import DataError
from jobs.context import JobContext
from jobs.report import assemble, engines
from jobs.settings import Settings
from jobs.training.judge import metrics_of
from jobs.training.results import downstream_results, upstream_results
from tests.synthetic import FIRST_DAY as DAY
from tests.synthetic import dataset
from tests.written import downstream_result, upstream_result

SPEC = dataset()
ROWS = pd.DataFrame({"user_id": [1, 1, 2, 2], "target_id": [1, 2, 3, 4], "label": [0, 1, 0, 1]})
UPSTREAM = f"python -m jobs train_upstream --dataset synthetic --model sum --ds {DAY}"
DOWNSTREAM = f"python -m jobs train_downstream --dataset synthetic --task click --ds {DAY}"


def test_the_report_names_every_engine_that_built_a_table() -> None:
    built = [("events", "spark"), ("sequences", "spark"), ("sequences", "sail")]
    partitions = [{"table": t, "engine": e} for t, e in (*built, ("user_embeddings", "torch"))]
    assert engines(partitions) == ["sail", "spark"]


@pytest.fixture
def context(tmp_path: Path) -> JobContext:
    """A day of SUM and of the task `click`, as the jobs leave it; the lake is empty."""
    settings = Settings.from_env({"HEADWATER_HOME": str(tmp_path)})
    upstream = settings.snapshot_dir(SPEC.name, "sum", DAY)
    downstream = settings.downstream_dir(SPEC.name, "click") / DAY
    for folder in (upstream, downstream):
        folder.mkdir(parents=True)
    evaluated = metrics_of(ROWS["label"].to_numpy(), np.full(len(ROWS), 0.5), 0.5)
    upstream_results(settings, SPEC.name, "sum").write(
        upstream_result({"click": evaluated}, ds=DAY)
    )
    ROWS.assign(task="click", prediction=0.5).to_parquet(upstream / "evaluation.parquet")
    downstream_results(settings, SPEC.name, "click").write(downstream_result(evaluated, ds=DAY))
    ROWS.assign(context=0.5).to_parquet(downstream / "predictions.parquet")
    return JobContext(dataset=SPEC, ds=DAY, settings=settings)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_json(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize(
    ("file", "command", "harms"),
    [
        (f"models/synthetic/sum/{DAY}/result.json", UPSTREAM, [other_json]),
        (f"models/synthetic/sum/{DAY}/evaluation.parquet", UPSTREAM, [Path.unlink]),
        (f"downstream/synthetic/click/{DAY}/result.json", DOWNSTREAM, [other_json]),
        (f"downstream/synthetic/click/{DAY}/predictions.parquet", DOWNSTREAM, [Path.unlink]),
    ],
)
def test_a_damaged_file_is_named_with_the_command_that_writes_it_again(
    context: JobContext, file: str, command: str, harms: list[Callable[[Path], None]]
) -> None:
    path = context.settings.home / file
    whole = path.read_bytes()
    for harm in (cut, garble, empty, *harms):
        harm(path)
        state = "damaged" if path.exists() else "gone"
        with pytest.raises(DataError, match=f"^{path} is {state}: run {command}, which writes"):
            assemble(context)
        path.write_bytes(whole)
    report = assemble(context)
    assert [a["name"] for a in report["tasks"][0]["arms"]] == ["context"]
    assert report["gates"][0]["verdict"] == "accepted"


def test_a_damaged_result_of_a_later_day_does_not_stop_an_earlier_one(context: JobContext) -> None:
    later = upstream_results(context.settings, SPEC.name, "sum")
    (later.root / "2024-05-02").mkdir()
    (later.root / "2024-05-02" / "result.json").write_text("{")
    assert list(later.until(DAY)) == [DAY]
    with pytest.raises(DataError, match="2024-05-02"):
        later.until("2024-05-02")
