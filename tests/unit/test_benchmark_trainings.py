"""Trainings side by side: each row of the paradigm reads what its title says, a difference is between the
right two, and variants are compared with the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ablations, paradigm
from benchmarks import trainings as trained
from benchmarks.ours import Ours
from benchmarks.paradigm import QUESTIONS, ROWS, answers
from benchmarks.results import Predictions, Result
from benchmarks.split import Split, base_rates, newest_split
from benchmarks.trainings import Trainings, markdown
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


def trainings(lake: MemoryLake, out: Path, **more: Any) -> Trainings:
    return Trainings(lake, SPEC, newest_split(lake, SPEC), out=out, **{"seeds": [0], **more})


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
    names = ["sum", "sequence:stale:members=2", "hybrid"]
    found = trainings(lake, tmp_path, seeds=[0, 1]).run(names)
    assert trained == [(name, seed) for seed in (0, 1) for name in names]
    assert {name: [r.seed for r in of] for name, of in found.items()} == {n: [0, 1] for n in names}
    trainings(lake, tmp_path, seeds=[0, 1]).run(names)
    assert len(trained) == 6
    trainings(lake, tmp_path, share=0.5).run(names)  # other rows
    assert len(trained) == 9


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("dlrm", "dlrm"),
        ("sequence:depth=2", "depth=2"),
        ("sum:mix.sizes=1", "'sum:mix.sizes=1' cannot be built: n_out is 1"),
        ("sequence:reversed", "no histories 'reversed'; known are unseen"),
        ("sequence:without=colour", "'without=colour' is no attribute of an event; known are"),
        (f"sequence:{SPEC.streams[0].name}=few", "is not a number of events"),
    ],
)
def test_a_name_that_makes_no_model_is_an_error_before_any_training(
    lake, tmp_path, monkeypatch, name, error
) -> None:
    monkeypatch.setattr(Ours, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(SpecError, match=error):
        trainings(lake, tmp_path).run(["sum", name])


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


def test_a_difference_is_of_the_first_row_less_the_second(lake, tmp_path) -> None:
    offs = {row: 0.1 + 0.05 * i for i, row in enumerate(ROWS)}
    results = {
        row: [
            Result(
                model=row, tasks=tuple(RATES), seed=seed, config={}, facts={"seconds": 60.0},
                predictions=predictions(off),
            )
            for seed in (0, 1)
        ]
        for row, off in offs.items()
    }  # fmt: skip
    of = trainings(lake, tmp_path)
    of.base_rates = RATES
    found = answers(of, results)
    assert len(found) == len(QUESTIONS)
    label = np.arange(40) % 2
    for text, one, other in QUESTIONS:
        for task, rate in RATES.items():
            a, b = (normalized_entropy(label, np.abs(label - offs[r]), rate) for r in (one, other))
            assert found[text][task].mean == pytest.approx(a - b)
    some = {row: results[row] for row in ("sequence", "sequence:stale")}
    assert list(answers(of, some)) == ["freshness: events of today"]
    made_up = replace(SPEC, simulated=True)
    text = markdown(results, found, RATES, made_up)
    assert all(row in text for row in ROWS) and "2 seed(s); simulated data" in text
    assert "simulated" not in markdown(results, found, RATES, replace(SPEC, simulated=False))


def test_the_paradigm_trains_every_row_and_keeps_its_table(
    lake, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(trained, "Lake", lambda *_: lake)
    monkeypatch.setattr(trained.datasets, "get", lambda _: SPEC)
    paradigm.main(["--dataset", "tiny", "--out", str(tmp_path), "--change", "queries=2"])
    (table,) = tmp_path.glob("*/paradigm.json")
    values = json.loads(table.read_text())
    assert list(values["ne"]) == list(ROWS.values()) and capsys.readouterr().out.count("| + ") == 12
    ne = [by_task["click"] for by_task in values["ne"].values()]
    assert len(set(ne)) == len(ROWS)  # each row reads something else
    kept = {json.loads(p.read_text())["model"] for p in table.parent.glob("*-*.json")}
    assert kept == {"sum", *(f"{row}:queries=2" for row in ROWS if row != "sum")}
    for more, error in (
        (["--first", DAYS[-1]], "error: the lake"),
        (["--models", "dlrm"], "error: --models: 'dlrm'"),
        (["--change", "depth=2"], "error: --models: depth=2"),
    ):
        with pytest.raises(SystemExit):
            paradigm.main(["--dataset", "tiny", "--out", str(tmp_path), *more])
        assert error in capsys.readouterr().err


def test_variants_are_compared_with_the_first(lake, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trained, "Lake", lambda *_: lake)
    monkeypatch.setattr(trained.datasets, "get", lambda _: SPEC)
    stream, attribute = SPEC.streams[0].name, SPEC.event_attributes[0].name
    names = ["sequence", f"sequence:{stream}=0", f"sequence:without={attribute}", "sum"]
    ablations.main(["--dataset", "tiny", "--out", str(tmp_path), "--models", ",".join(names)])
    (table,) = tmp_path.glob("*/ablations.json")
    values = json.loads(table.read_text())
    assert list(values["ne"]) == names
    for name, (title, found) in zip(names[1:], values["differences"].items(), strict=True):
        assert title == f"{name}, less sequence"
        for task, interval in found.items():
            apart = values["ne"][name][task] - values["ne"]["sequence"][task]
            assert interval["mean"] == pytest.approx(apart) and apart != 0
    assert f"| {names[1]}, less sequence |" in capsys.readouterr().out
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
