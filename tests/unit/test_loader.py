"""The loader's batches are the tables' rows: nothing lost, nothing invented, nothing moved."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.columns import NO_LABEL
from feature_store.days import add_days
from feature_store.errors import DataError
from feature_store.spec import IdType
from jobs.training.ids import held_out, int64_ids, mix
from jobs.training.loader import (
    Limits,
    Users,
    labelled_batches,
    labelled_day,
    user_batches,
)
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

SECOND_DAY = add_days(FIRST_DAY, 1)

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


def _lake(user_id_type=IdType.INT64, users=20, seed=0, days=2):
    spec = dataset(user_id_type=user_id_type)
    return spec, MemoryLake(spec, tables(spec, days=days, users=users, seed=seed))


def _user_key(spec, user) -> int:
    kind = pa.int64() if spec.user_id_type is IdType.INT64 else pa.string()
    return int(int64_ids(pa.array([user], kind))[0])


def _timeline(spec, row) -> list[dict]:
    events = []
    for index, stream in enumerate(spec.streams):
        prefix = f"history__{stream.name}__"
        for i, available in enumerate(row[f"{prefix}available_time"]):
            event = {a.name: row[prefix + a.name][i] for a in stream.attributes}
            event |= {
                "stream": index,
                "available": available,
                "time": row[f"{prefix}event_time"][i],
            }
            events.append((available, index, i, event))
    return [e[3] for e in sorted(events, key=lambda e: e[:3])]


def _same(a, b) -> bool:
    return (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b)


def _check_batch(spec, batch, expected, seen) -> None:
    for r in range(batch.rows):
        user = int(batch.user_id[r])
        t0, t1 = batch.target_offsets[r].item(), batch.target_offsets[r + 1].item()
        key = (user, batch.time[t0].item())
        row, labels = expected[key]
        seen[key] = seen.get(key, 0) + 1
        assert t1 - t0 == len(row["targets__time"])
        timeline = _timeline(spec, row)
        e0, e1 = batch.event_offsets[r].item(), batch.event_offsets[r + 1].item()
        assert e1 - e0 == len(timeline)
        for n, event in enumerate(timeline, start=e0):
            assert batch.event_stream[n] == event["stream"]
            assert batch.event_time[n] == event["time"]
            assert batch.event_available[n] == event["available"]
            assert batch.event_ids["ad"][n] == event.get("ad", -1)
            assert batch.event_ids["category"][n] == event["category"]
            assert _same(batch.event_floats["price"][n].item(), event.get("price", float("nan")))
            image = batch.event_floats["image"][n].tolist()
            assert image == pytest.approx(event.get("image", [0.0] * 3))
        for i, t in enumerate(range(t0, t1)):
            assert batch.row_of_target[t] == r
            assert batch.as_of[t] == row["targets__as_of"][i]
            assert batch.item_id[t] == row["targets__item_id"][i]
            assert batch.target_kind[t] == row["targets__target"][i]
            # what the target may see is exactly what was available before it
            assert batch.history_end[t] == sum(e["available"] < batch.as_of[t] for e in timeline)
            for name in ("surface", "category"):
                assert batch.context_ids[name][t] == row[f"targets__context__{name}"][i]
            assert _same(batch.context_floats["price"][t].item(), row["targets__context__price"][i])
            features = [row[f"targets__item__{n}"][i] for n in spec.item_features.names]
            known = len(features)
            assert batch.item_features[t, :known].tolist() == pytest.approx(features)
            assert batch.labels[t].tolist() == [labels[k.name][i] for k in spec.tasks]
        assert batch.has_aggregates[r] == row["has_aggregates"]
        assert batch.user_ids["favourite"][r] == row["user__favourite"]
        for name in ("liked", "clicked"):
            sparse = batch.sparse[name]
            lo, hi = sparse.offsets[r].item(), sparse.offsets[r + 1].item()
            assert sparse.values[lo:hi].tolist() == row[f"sparse__{name}"]
        scores = batch.sparse["liked"].scores
        lo, hi = (
            batch.sparse["liked"].offsets[r].item(),
            batch.sparse["liked"].offsets[r + 1].item(),
        )
        assert scores[lo:hi].tolist() == row["sparse__liked__scores"]
        assert batch.sparse["clicked"].scores is None
        for i, feature in enumerate(spec.dense_features):
            assert _same(batch.dense[r, i].item(), row[f"dense__{feature.name}"])


def _expected(spec, lake, ds) -> dict:
    """(user, time of first target) -> (row of examples, labels by task) of what became final on ds."""
    out = {}
    labels = lake.rows["labels"][ds].to_pylist()
    for shown in {r["shown_ds"] for r in labels}:
        for row in lake.rows["examples"][shown].to_pylist():
            mine = {
                r["task"]: r["labels"]
                for r in labels
                if (r["user_id"], r["shown_ds"], r["part"]) == (row["user_id"], shown, row["part"])
            }
            if mine:
                nothing = [-1] * len(row["targets__time"])
                mine = {t.name: mine.get(t.name, nothing) for t in spec.tasks}
                out[_user_key(spec, row["user_id"]), row["targets__time"][0]] = (row, mine)
    return out


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    order=st.one_of(st.none(), st.integers(0, 10**6)),
    max_targets=st.integers(1, 60),
    max_events=st.integers(1, 200),
    read_rows=st.integers(1, 12),
    buffer_bytes=st.sampled_from([1, 4096, 1 << 20]),
    strings=st.booleans(),
)
def test_batches_are_the_rows_of_the_tables(
    seed, order, max_targets, max_events, read_rows, buffer_bytes, strings
):
    spec, lake = _lake(IdType.STRING if strings else IdType.INT64, users=9, seed=seed)
    limits = Limits(
        max_targets=max_targets,
        max_events=max_events,
        read_rows=read_rows,
        buffer_bytes=buffer_bytes,
    )
    day = labelled_day(lake, spec, SECOND_DAY)
    expected = _expected(spec, lake, SECOND_DAY)
    seen: dict = {}
    for batch in labelled_batches(
        lake, spec, day.shown, users=Users.ALL, seed=order, limits=limits
    ):
        assert batch.rows == 1 or batch.targets <= max_targets
        assert batch.rows == 1 or batch.events <= max_events
        _check_batch(spec, batch, expected, seen)
    assert seen == dict.fromkeys(expected, 1)


def test_one_day_mixes_the_tasks_that_mature_on_different_days():
    spec, lake = _lake()
    day = labelled_day(lake, spec, SECOND_DAY)
    assert [s.ds for s in day.shown] == [FIRST_DAY, SECOND_DAY]
    assert [s.labels.tasks for s in day.shown] == [("buy",), ("click",)]
    assert set(day.inputs) == {
        f"labels/{SECOND_DAY}",
        f"examples/{FIRST_DAY}",
        f"examples/{SECOND_DAY}",
        f"item_aggregates/{FIRST_DAY}",
        f"item_aggregates/{SECOND_DAY}",
    }
    batches = list(
        labelled_batches(
            lake, spec, day.shown, users=Users.ALL, seed=1, limits=Limits(max_targets=40)
        )
    )
    both = [b for b in batches if ((b.labels >= 0).any(dim=0)).all()]
    assert len(both) >= len(batches) - 1


def test_first_day_has_only_the_tasks_that_mature_at_once():
    spec, lake = _lake()
    day = labelled_day(lake, spec, FIRST_DAY)
    assert [(s.ds, s.labels.tasks) for s in day.shown] == [(FIRST_DAY, ("click",))]


def test_labels_of_days_before_come_beside_those_of_the_day_each_once():
    spec, lake = _lake()
    first, second = (labelled_day(lake, spec, ds) for ds in (FIRST_DAY, SECOND_DAY))
    both = labelled_day(lake, spec, SECOND_DAY, also=[FIRST_DAY])
    assert both.final_days == [FIRST_DAY, SECOND_DAY]
    assert [(s.ds, s.final) for s in both.today] == [(s.ds, s.final) for s in second.shown]
    assert [s.ds for s in both.shown] == [FIRST_DAY, FIRST_DAY, SECOND_DAY]
    assert both.inputs == first.inputs | second.inputs
    assert both.counts() == {
        task: tuple(np.add(first.counts().get(task, (0, 0)), found))
        for task, found in second.counts().items()
    }

    def labels(day):
        batches = labelled_batches(lake, spec, day.shown, users=Users.ALL, seed=1)
        rows = [
            (int(b.user_id[row]), int(as_of), index, int(label))
            for b in batches
            for row, as_of, of in zip(b.row_of_target, b.as_of, b.labels, strict=True)
            for index, label in enumerate(of)
            if label != NO_LABEL
        ]
        return sorted(rows)

    assert labels(both) == sorted(labels(first) + labels(second))
    again = labelled_day(lake, spec, SECOND_DAY, also=[FIRST_DAY], inputs=both.inputs)
    assert (again.final_days, labels(again)) == (both.final_days, labels(both))


def test_held_out_users_are_never_in_training_and_are_all_there_is_in_the_gate():
    spec, lake = _lake(users=60)
    day = labelled_day(lake, spec, SECOND_DAY)

    def users(which):
        batches = labelled_batches(lake, spec, day.shown, users=which)
        return {int(u) for b in batches for u in b.user_id}

    everyone, training, gate = users(Users.ALL), users(Users.TRAINING), users(Users.HELD_OUT)
    assert training | gate == everyone
    assert not training & gate
    assert training and gate
    split = held_out(np.array(sorted(gate)), spec.held_out_share)
    assert split.all()


def test_held_out_share_is_what_the_spec_says():
    share = held_out(np.arange(200_000), 0.1).mean()
    assert share == pytest.approx(0.1, abs=0.003)
    assert mix(np.array([1, 2]), 5).tolist() != mix(np.array([1, 2]), 6).tolist()


def test_order_depends_on_the_seed_and_not_on_how_the_rows_lie():
    spec, lake = _lake(users=30)
    other = MemoryLake(
        spec, {t: {d: _reversed(x) for d, x in by.items()} for t, by in lake.rows.items()}
    )

    def order(source, seed):
        day = labelled_day(source, spec, SECOND_DAY)
        batches = labelled_batches(source, spec, day.shown, users=Users.ALL, seed=seed)
        return [t for b in batches for t in b.time.tolist()]

    assert order(lake, 1) == order(lake, 1)
    assert order(lake, 1) == order(other, 1)
    assert order(lake, 1) != order(lake, 2)
    assert sorted(order(lake, 1)) == sorted(order(lake, 2))


def _reversed(table: pa.Table) -> pa.Table:
    return table.take(pa.array(range(table.num_rows - 1, -1, -1), pa.int64()))


def test_skipping_resumes_where_a_run_stopped():
    spec, lake = _lake(users=30)
    day = labelled_day(lake, spec, SECOND_DAY)

    def run(skip):
        limits = Limits(max_targets=30)
        return [
            b.time.tolist()
            for b in labelled_batches(
                lake, spec, day.shown, users=Users.TRAINING, seed=3, limits=limits, skip=skip
            )
        ]

    everything = run(0)
    assert len(everything) > 4
    assert run(3) == everything[3:]


def test_columns_that_a_model_does_not_need_are_not_read():
    spec, lake = _lake()
    asked: list[str] = []
    read = lake.batches

    def batches(table, *, columns, **rest):
        asked.extend(columns)
        return read(table, columns=columns, **rest)

    lake.batches = batches
    day = labelled_day(lake, spec, SECOND_DAY)
    without = list(labelled_batches(lake, spec, day.shown, users=Users.ALL, history=False))
    assert not [c for c in asked if c.startswith("history__")]
    assert sum(b.events for b in without) == 0
    assert int(without[0].history_end.max()) == 0
    asked.clear()
    only = list(labelled_batches(lake, spec, day.shown, users=Users.ALL, user_features=False))
    assert not [c for c in asked if c.startswith(("dense__", "sparse__", "user__"))]
    assert sum(b.events for b in only) > 0


def test_labels_that_do_not_fit_their_targets_are_refused():
    spec, lake = _lake()
    rows = lake.rows["labels"][SECOND_DAY].to_pylist()
    rows[0]["labels"] = [*rows[0]["labels"], 1]
    lake.rows["labels"][SECOND_DAY] = pa.Table.from_pylist(
        rows, schema=lake.rows["labels"][SECOND_DAY].schema
    )
    day = labelled_day(lake, spec, SECOND_DAY)
    with pytest.raises(DataError, match="run build_labels again"):
        list(labelled_batches(lake, spec, day.shown, users=Users.ALL))


@pytest.mark.parametrize("table", ["aggregates", "sequences"])
def test_user_tables_become_batches_without_targets(table):
    spec, lake = _lake(IdType.STRING)
    rows = lake.rows[table][SECOND_DAY].to_pylist()
    cutoff = None
    if table == "sequences":
        cutoff = sorted(a for r in rows for a in r["history__likes__available_time"])[-5]
    got = []
    source = lake.batches(table, days=[SECOND_DAY], batch_rows=7)
    for users, batch in user_batches(spec, source, limits=Limits(max_targets=3), cutoff=cutoff):
        assert batch.targets == 0 and batch.rows == len(users) <= 3
        got += list(zip(users.to_pylist(), range(batch.rows), [batch] * batch.rows, strict=True))
    assert [g[0] for g in got] == [r["user_id"] for r in rows]
    for (_, r, batch), row in zip(got, rows, strict=True):
        if table == "aggregates":
            assert batch.has_aggregates[r] == 1
            assert batch.dense[r, 0] == row["dense__likes_1d"]
            continue
        assert batch.has_aggregates[r] == 0
        want = [e["available"] for e in _timeline(spec, row) if e["available"] < cutoff]
        lo, hi = batch.event_offsets[r].item(), batch.event_offsets[r + 1].item()
        assert batch.event_available[lo:hi].tolist() == want
