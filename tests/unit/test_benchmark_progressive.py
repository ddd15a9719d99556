"""Upstream models trained day by day for benchmarks: whose weights, which day, and nothing twice."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import alone, embedding_shift
from benchmarks.alone import Program, Round, rounds
from benchmarks.embedding_shift import (
    HELD,
    SERVED,
    TRAINING,
    answers,
    arguments,
    lines,
    markdown,
    mean_drift,
    part,
)
from benchmarks.progressive import Progressive, published
from benchmarks.results import Pair, Predictions, Result, mean_ne_difference
from feature_store.days import day_of, shift
from feature_store.embeddings import EmbeddingKind
from feature_store.errors import DataError
from jobs.publish_embeddings import UserRows
from jobs.settings import Settings
from jobs.train_upstream import UpstreamDay
from jobs.training.checkpoints import Checkpoints, state_hash
from jobs.training.ids import held_out
from jobs.training.loader import user_batches
from jobs.training.loop import Learner
from jobs.training.whole import whole_learner
from models.metrics import bootstrap_ne_differences
from tests.embedded import numbered
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore")

DAYS = [shift(FIRST_DAY, i) for i in range(7)]
USERS = 12
SPEC = dataset()
RAW, POOLED = EmbeddingKind.RAW, EmbeddingKind.POOLED


@pytest.fixture(scope="module")
def lake() -> MemoryLake:
    return MemoryLake(SPEC, tables(SPEC, days=len(DAYS), users=USERS))


@pytest.fixture(autouse=True)
def in_memory(lake: MemoryLake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.lake.Lake", lambda *_, **__: lake)


@dataclass
class Run:
    """Every answer, run once; hashes of the parents' weights in the order in which they were kept."""

    out: Path
    results: list[Result]
    parents: list[str]


@pytest.fixture(scope="module")
def whole(lake: MemoryLake, tmp_path_factory) -> Run:
    parents: list[str] = []
    keep = Learner.keep_parent

    def seen(self: Learner, tasks: Collection[str]) -> None:
        keep(self, tasks)
        if self.parent is not None:
            parents.append(state_hash(self.parent.state_dict()))

    out = tmp_path_factory.mktemp("shift")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("feature_store.lake.Lake", lambda *_, **__: lake)
        patch.setattr(Learner, "keep_parent", seen)
        return Run(out, run_in(out), parents)


def run_in(out: Path) -> list[Result]:
    args = arguments(["--dataset", SPEC.name, "--out", str(out)])
    return embedding_shift.run(Program("embedding_shift", Settings.from_env({}), SPEC, args))


def training(out: Path, model: str = "sum") -> Progressive:
    return Progressive(Settings.from_env({}), SPEC, model, seed=0, out=out)


def checkpoints(of: Progressive) -> Checkpoints:
    return Checkpoints(of.settings.snapshot_dir(SPEC.name, of.name, FIRST_DAY).parent)


# ---- upstream


def test_served_is_by_the_snapshot_of_the_day_and_held_by_that_of_the_day_before(
    lake: MemoryLake, whole: Run
) -> None:
    mine = training(whole.out)
    days = mine.run()
    assert list(days) == DAYS and days[DAYS[0]].held is None
    kept, ds = checkpoints(mine), DAYS[3]
    users = UserRows.of(lake, mine.preset, ds).batches(lake, mine.preset)
    batches = list(user_batches(SPEC, users))
    for found, snapshot_of in ((days[ds].served, ds), (days[ds].held, DAYS[2])):
        assert found is not None
        learner = whole_learner(SPEC, kept, kept.champion(snapshot_of), ds=ds)
        assert found.snapshot == kept.champion(snapshot_of).id
        for ids, batch in batches:
            stored, present = found.lookup(ids)
            assert present.all()
            np.testing.assert_allclose(stored, learner.user_embeddings(batch), atol=2e-3)
    assert not np.allclose(days[ds].served.values, days[ds].held.values, atol=2e-3)
    assert days[ds].held.snapshot == days[DAYS[2]].served.snapshot
    assert set(days[ds].ne) == {"click", "buy"} and not days[DAYS[0]].ne


def test_a_day_with_a_shift_term_looks_back_at_the_day_before(whole: Run) -> None:
    _, *with_term = answers("sum")
    kept = [checkpoints(training(whole.out, model)) for model in with_term]
    assert whole.parents == [of.champion(ds).state_hash for of in kept for ds in DAYS[:-1]]
    assert len(set(whole.parents)) == 2 * len(DAYS) - 3  # the two share the first day's


def test_variants_start_from_the_same_weights_and_part_on_the_second_day(whole: Run) -> None:
    one, *others = (training(whole.out, model).run() for model in answers("sum"))
    for other in others:
        np.testing.assert_array_equal(one[DAYS[0]].served.values, other[DAYS[0]].served.values)
        assert (one[DAYS[1]].served.values != other[DAYS[1]].served.values).any()


def test_what_is_kept_is_not_trained_again(
    lake: MemoryLake, whole: Run, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(whole.out, tmp_path, dirs_exist_ok=True)
    first = training(whole.out).run()
    trained: list[str] = []
    run = UpstreamDay.run

    def counted(self: UpstreamDay):
        trained.append(self.context.ds)
        return run(self)

    monkeypatch.setattr(UpstreamDay, "run", counted)
    again = training(tmp_path).run()
    assert not trained
    for ds in DAYS:
        np.testing.assert_array_equal(first[ds].served.values, again[ds].served.values)
        assert first[ds].served.ids.equals(again[ds].served.ids) and first[ds].ne == again[ds].ne
    training(tmp_path)._path(DAYS[6]).unlink()
    np.testing.assert_array_equal(
        training(tmp_path).run()[DAYS[6]].served.values, first[DAYS[6]].served.values
    )
    assert trained == DAYS[6:]
    partitions = lake.partitions

    def rebuilt(table: str, model: str = "") -> dict[str, SimpleNamespace]:
        """Day 4's labels are written once more."""
        found = partitions(table, model)
        return found | {DAYS[4]: SimpleNamespace(version=2)} if table == "labels" else found

    monkeypatch.setattr(lake, "partitions", rebuilt)
    trained.clear()
    training(tmp_path).run()
    assert trained == DAYS[4:]  # and all that builds on it


def test_a_lake_without_days_says_how_to_get_some(lake: MemoryLake, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lake, "partitions", lambda *_: {})
    with pytest.raises(DataError, match="make run"):
        training(tmp_path)


# ---- which embeddings


def test_pooling_is_over_three_days_and_held_is_one_of_them() -> None:
    days = numbered(DAYS, users=USERS, held=1.5)

    def value(ds: str, kind: EmbeddingKind, held: bool = False) -> float:
        return float(published(days, ds, kind, held=held).values[0, 0, 0])

    assert [value(DAYS[4], RAW), value(DAYS[4], RAW, held=True)] == [4.0, 5.5]
    assert [value(DAYS[4], POOLED), value(DAYS[4], POOLED, held=True)] == [3.0, 3.5]
    assert value(DAYS[1], POOLED) == 0.5
    with pytest.raises(DataError, match="later day"):
        published(days, DAYS[0], RAW, held=True)


def test_targets_read_the_day_before_and_only_the_snapshot_is_held(lake, monkeypatch) -> None:
    seen: list[tuple[str, list[tuple[str, float]]]] = []

    def values(batches) -> list[tuple[str, float]]:
        """Day shown and what its targets read, of users who have something."""
        found = set()
        for item in batches:
            (of,) = item.published.values()
            for as_of, row in zip(item.batch.as_of, item.batch.row_of_target, strict=True):
                assert of.present[row]
                found.add((day_of(int(as_of), SPEC.utc_offset), float(of.values[row, 0, 0])))
        return sorted(found)

    def fit(spec, task, batches, *, seed):
        seen.append(("fit", values(batches)))
        users = np.concatenate([b.batch.user_id.numpy() for b in batches])
        assert not held_out(users, SPEC.held_out_share).any()

        def predict(test):
            seen.append(("predict", values(test)))
            return SimpleNamespace(**dict.fromkeys(
                ("user_id", "target_id", "label", "prediction"), np.empty(0)
            ), __len__=lambda: 0)  # fmt: skip

        return predict

    monkeypatch.setattr(embedding_shift, "fit", fit)
    monkeypatch.setattr(embedding_shift, "of_scored", lambda *_: some([]))
    days = numbered(DAYS, users=USERS)
    upstream = SimpleNamespace(dataset=SPEC, lake=lake, days=DAYS, run=lambda: days)
    embedding_shift.measure(upstream, seed=0)
    first = seen[:8]  # the oldest round of the first task: raw, then pooled
    place = {ds: i for i, ds in enumerate(DAYS)}
    shown = DAYS[1:4]
    raw = [(ds, float(place[ds] - 1)) for ds in shown]
    pooled = [(DAYS[1], 0.0), (DAYS[2], 0.5), (DAYS[3], 1.0)]
    for of, learned, held in (
        (first[:4], raw, 3.5),
        (first[4:], pooled, np.float32(np.float16((3.5 + 2 + 1) / 3))),
    ):
        assert of[0] == ("fit", learned)
        assert of[1] == ("predict", learned[-1:])
        served = 3.0 if learned is raw else 2.0
        assert of[2] == ("predict", [(DAYS[4], served)])
        assert of[3] == ("predict", [(DAYS[4], float(held))])


def test_rounds_end_on_the_day_before_the_test_and_need_labels(lake: MemoryLake, monkeypatch):
    click, buy = SPEC.tasks
    found = rounds(lake, SPEC, click, DAYS)
    assert found[0] == Round(training=tuple(DAYS[1:4]), test=DAYS[4])
    assert [r.test for r in found] == DAYS[4:7]
    assert all(r.served == shift(r.test, -1) and len(r.training) <= 5 for r in found)
    assert [r.test for r in rounds(lake, SPEC, buy, DAYS)] == DAYS[4:6]
    gap = [r.test for r in rounds(lake, SPEC, click, [ds for ds in DAYS if ds != DAYS[3]])]
    assert DAYS[5] not in gap  # the day before it, 4, has no embeddings
    with pytest.raises(DataError, match="build more days"):
        rounds(lake, SPEC, click, DAYS[:3])
    monkeypatch.setattr(alone, "ROUNDS", 2)
    assert [r.test for r in rounds(lake, SPEC, click, DAYS)] == DAYS[5:7]


# ---- differences


def some(users, *, offset: float = 0.0, task: str = "click", part: str = "x") -> Predictions:
    rng = np.random.default_rng(1)
    n = len(users)
    label = rng.integers(2, size=n)
    return Predictions(
        task=np.full(n, task), part=np.full(n, part), user_id=np.array(users, np.int64),
        target_id=np.arange(n), label=label,
        prediction=np.clip(rng.random(n) + offset * (label - 0.5), 0.05, 0.95),
    )  # fmt: skip


def test_the_interval_of_one_pair_is_that_of_the_metric() -> None:
    users = np.arange(60) // 3
    mine, other = some(users, offset=0.3), some(users)
    found = mean_ne_difference([Pair(mine, other, 0.4)], samples=50)
    want = bootstrap_ne_differences(
        mine.label, {"it": (mine.prediction, other.prediction)}, users, 0.4, samples=50
    )["it"]
    for name in ("mean", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(want, name))
    assert found.mean < 0


def test_pairs_count_alike_however_many_labels_they_have_and_draw_users_together() -> None:
    many, few = np.arange(90) // 3, np.arange(30)
    a = Pair(some(many, offset=0.3), some(many), 0.5)
    b = Pair(some(few, offset=-0.3), some(few), 0.2)
    both = mean_ne_difference([a, b], samples=200)
    alone_ = [mean_ne_difference([pair]).mean for pair in (a, b)]
    assert both.mean == pytest.approx(np.mean(alone_))
    against = mean_ne_difference([a, Pair(a.other, a.mine, a.base_rate)], samples=200)
    assert abs(against.low) < 1e-12 and abs(against.high) < 1e-12
    with pytest.raises(DataError, match="different labels"):
        moved = replace(a.other, label=1 - a.other.label)
        mean_ne_difference([Pair(a.mine, moved, 0.5)])


# ---- the whole


def unchanged(self: Learner, batch) -> dict[str, torch.Tensor]:
    """A step that learns nothing."""
    n = len(SPEC.tasks)
    nothing = torch.zeros(n, dtype=torch.int64)
    return {"per_task": torch.zeros(n), "counts": nothing, "positives": nothing}


def test_where_weights_do_not_change_there_is_no_shift_and_it_costs_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Learner, "step", unchanged)
    upstream = training(tmp_path)
    upstream.days = DAYS[:5]
    days = upstream.run()
    for kind in EmbeddingKind:
        moved = mean_drift(days, DAYS[3:5], kind)
        assert moved["cosine_same_features"] == pytest.approx(1.0)
        assert moved["l2_relative_same_features"] == 0.0
        assert moved["cosine"] < 0.9999 and moved["l2_relative"] > 0  # other features
    predictions, facts = embedding_shift.measure(upstream, seed=0)
    for kind in EmbeddingKind:
        served, held = (predictions.of("click", part(kind, side)) for side in (SERVED, HELD))
        assert len(served) and (served.prediction == held.prediction).all()
    assert set(facts["base_rates"]) == {"click", "buy"}


def test_every_answer_is_measured_on_the_same_labels_once(lake, whole: Run, monkeypatch) -> None:
    found = whole.results
    assert [r.model for r in found] == answers("sum") == ["sum", "sum_regularise", "sum_distil"]
    shown = lake.rows["impressions"]
    for r in found:
        for kind in EmbeddingKind:
            tested = r.predictions.of("click", part(kind, SERVED)).target_id.tolist()
            want = [t for ds in DAYS[4:7] for t in shown[ds]["target_id"].to_pylist()]
            assert tested == sorted(want)
            trained = set(r.predictions.of("click", part(kind, TRAINING)).target_id.tolist())
            want = {t for ds in DAYS[3:6] for t in shown[ds]["target_id"].to_pylist()}
            assert trained and trained < want  # without the held-out users
    table = lines(found)
    (first, *_) = table
    assert len(table) == 3 * 3 * 2 and first.to_none[SERVED].mean == 0.0
    by = {(x.task, x.model, x.kind): x for x in table}
    for x in table:
        assert x.cost.mean == pytest.approx(x.ne[SERVED] - x.ne[HELD])
        none = by[x.task, "sum", RAW]
        assert x.to_none[TRAINING].mean == pytest.approx(x.ne[TRAINING] - none.ne[TRAINING])
    tasks = [by[t, "sum", POOLED].ne[SERVED] for t in ("click", "buy")]
    assert first.task == alone.ALL_TASKS
    assert by[first.task, "sum", POOLED].ne[SERVED] == pytest.approx(np.mean(tasks))
    held = by["click", "sum_regularise", RAW].drift["l2_relative_same_features"]
    assert held < by["click", "sum", RAW].drift["l2_relative_same_features"]
    assert "### NE downstream: buy" in markdown(table)
    monkeypatch.setattr(Progressive, "run", None)
    assert markdown(lines(run_in(whole.out))) == markdown(table)
