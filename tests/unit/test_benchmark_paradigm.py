"""The paradigm's table: each row reads what its title says, and a difference is between the right two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import paradigm as program
from benchmarks.ours import Ours
from benchmarks.paradigm import QUESTIONS, ROWS, Paradigm, answers, arguments, markdown
from benchmarks.results import Predictions, Result
from benchmarks.split import Split, base_rates, newest_split
from feature_store.days import shift
from feature_store.errors import DataError, SpecError
from models.metrics import normalized_entropy
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore")

DAYS = [shift(FIRST_DAY, i) for i in range(7)]
SPEC = dataset()
RATES = {"click": 0.3, "buy": 0.2}


@pytest.fixture(scope="module")
def lake() -> MemoryLake:
    return MemoryLake(SPEC, tables(SPEC, days=len(DAYS), users=12))


def paradigm(lake: MemoryLake, out: Path, *more: str) -> Paradigm:
    return Paradigm(lake, SPEC, arguments(["--dataset", "simulated", "--out", str(out), *more]))


def test_the_split_is_the_newest_days_that_every_task_has_answers_for(lake) -> None:
    late = max(task.matures_after for task in SPEC.tasks)
    known = [ds for ds in sorted(lake.rows["examples"]) if shift(ds, late) in lake.rows["labels"]]
    assert late == 1 and known[-1] == DAYS[-2]
    assert newest_split(lake, SPEC) == Split(
        train=(known[0], known[-4]), validation=(known[-3],) * 2, test=(known[-2], known[-1])
    )
    later = newest_split(lake, SPEC, first=known[1])
    assert later.train == (known[1], known[-4])
    with pytest.raises(DataError, match=f"from {known[-3]} on.*make run"):
        newest_split(lake, SPEC, first=known[-3])


def test_base_rates_are_of_the_labels_of_what_the_days_showed(lake) -> None:
    shown = [r for ds in DAYS[1:3] for r in lake.rows["impressions"][ds].to_pylist()]
    found = base_rates(lake, SPEC, DAYS[1:3], list(RATES))
    for task, label in (("click", "label__clicked"), ("buy", "label__bought")):
        assert found[task] == pytest.approx(np.mean([r[label] for r in shown]))
    with pytest.raises(DataError, match="buy has no label"):  # its answers come a day later
        base_rates(lake, SPEC, [DAYS[-1]], list(RATES))
    assert list(base_rates(lake, SPEC, [DAYS[-1]], ["click"])) == ["click"]


def test_rows_are_trained_once_by_their_names_and_seeds(lake, tmp_path, monkeypatch) -> None:
    trained: list[tuple[str, int]] = []

    def run(self: Ours, tasks: list[str], seed: int) -> tuple[Predictions, dict]:
        assert tasks == ["click", "buy"]
        trained.append((self.model, seed))
        return predictions(0.1), {"seconds": 1.0}

    monkeypatch.setattr(Ours, "run", run)
    more = ("--seeds", "0,1", "--change", "members=2", "--models", "sum,sequence:stale,hybrid")
    found = paradigm(lake, tmp_path, *more).run()
    names = ["sum", "sequence:stale:members=2", "hybrid:members=2"]
    assert trained == [(name, seed) for seed in (0, 1) for name in names]
    assert {row: [r.seed for r in of] for row, of in found.items()} == {
        row: [0, 1] for row in ("sum", "sequence:stale", "hybrid")
    }
    paradigm(lake, tmp_path, *more).run()
    assert len(trained) == 6
    for flag, value in (("--models", "dlrm"), ("--change", "depth=2")):
        with pytest.raises(SpecError, match=f"--models.*{value}"):
            paradigm(lake, tmp_path, flag, value).run()


def predictions(off: float) -> Predictions:
    """Of two tasks in both parts, wrong by `off` for every label."""
    n = 40
    label = np.arange(n) % 2
    one = {
        "user_id": np.arange(n) // 4,
        "target_id": np.arange(n),
        "label": label,
        "prediction": np.abs(label - off),
    }
    parts = [(task, part) for task in RATES for part in ("validation", "test")]
    columns = {k: np.concatenate([v] * len(parts)) for k, v in one.items()}
    return Predictions(
        task=np.repeat([t for t, _ in parts], n),
        part=np.repeat([p for _, p in parts], n),
        **columns,
    )


def test_a_difference_is_of_the_first_row_less_the_second() -> None:
    offs = {row: 0.1 + 0.05 * i for i, row in enumerate(ROWS)}
    results = {
        row: [
            Result(
                model=row, tasks=tuple(RATES), seed=seed, config={}, facts={},
                predictions=predictions(off),
            )
            for seed in (0, 1)
        ]
        for row, off in offs.items()
    }  # fmt: skip
    found = answers(results, RATES)
    assert len(found) == len(QUESTIONS)
    label = np.arange(40) % 2
    for text, one, other in QUESTIONS:
        for task, rate in RATES.items():
            a, b = (normalized_entropy(label, np.abs(label - offs[r]), rate) for r in (one, other))
            assert found[text][task].mean == pytest.approx(a - b)
    some = {row: results[row] for row in ("sequence", "sequence:stale")}
    assert list(answers(some, RATES)) == ["freshness: events of today"]
    made_up = replace(SPEC, simulated=True)
    text = markdown(results, found, RATES, made_up)
    assert all(title in text for title in ROWS.values()) and "2 seed(s); simulated data" in text
    assert "simulated" not in markdown(results, found, RATES, replace(SPEC, simulated=False))


def test_the_program_trains_every_row_and_keeps_its_table(
    lake, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(program, "Lake", lambda *_: lake)
    monkeypatch.setattr(program.datasets, "get", lambda _: SPEC)
    program.main(["--dataset", "tiny", "--out", str(tmp_path)])
    (table,) = tmp_path.glob("paradigm/*/table.json")
    values = json.loads(table.read_text())
    assert list(values["ne"]) == list(ROWS) and capsys.readouterr().out.count("| + ") == 12
    ne = [by_task["click"] for by_task in values["ne"].values()]
    assert len(set(ne)) == len(ROWS)  # each row reads something else
    with pytest.raises(SystemExit):
        program.main(["--dataset", "tiny", "--out", str(tmp_path), "--first", DAYS[-1]])
    assert "error: the lake" in capsys.readouterr().err
