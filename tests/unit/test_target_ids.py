"""A target is known by its user, its kind and its id, as text or as a number, from log to labels."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.columns import NO_LABEL
from feature_store.days import HOUR_US, start_us
from feature_store.spec import Attribute, EventLabel, IdType, Kind, Task
from feature_store.spec_parts import MAX_FLOAT32
from feature_store.tables import contract
from jobs import build_aggregates, build_examples, build_labels
from jobs.training.loader import Limits, cuts
from jobs.training.rows import unpacked_rows
from jobs.training.scoring import concat, labelled_predictions
from jobs.training.upstream_day import write_evaluation
from tests import synthetic
from tests.frames import frame, rows_of
from tests.tiny import DAYS, TINY, Row, event, target

DS = DAYS[1]
NOON = start_us(DS, TINY.utc_offset) + 12 * HOUR_US


@pytest.mark.parametrize(
    ("kind", "ids"), [(IdType.INT64, (7, 3)), (IdType.STRING, ("seven", "07"))], ids=str
)
def test_targets_that_share_an_id_get_their_own_answers(spark, kind: IdType, ids: tuple) -> None:
    """Two users and two kinds number their targets alike, at one instant."""
    shown = Attribute(name="shown", id_type=kind)
    click = replace(TINY.streams[0], attributes=(*TINY.streams[0].attributes, shown))
    label = EventLabel(stream="click", within=timedelta(hours=6), match=(("target_id", "shown"),))
    given = replace(TINY.task("clicked"), targets=("ad", "visit"))
    dataset = replace(
        TINY, target_id_type=kind, streams=(click, TINY.streams[1]), item_features=None,
        tasks=(given, Task(name="answered", label=label, targets=("ad",), matures_after=1)),
    )  # fmt: skip
    impressions: list[Row] = []
    for user, answers in ((1, (1, 0, 1)), (2, (0, 1, 0))):
        keys = ((ids[0], "ad"), (ids[0], "visit"), (ids[1], "ad"))
        for (number, name), answer in zip(keys, answers, strict=True):
            row = target(0, name, user, NOON, item_id=5, label__clicked=answer)
            del row["label__bought"]
            impressions.append({**row, "target_id": number})
    events = [event(1, "click", 1, NOON + HOUR_US, shown=ids[1]) | {"ds": DS}]

    nothing = {t: frame(spark, [], t, dataset) for t in ("sequences", "aggregates")}
    shown_rows = frame(spark, impressions, "impressions", dataset)
    came = frame(spark, events, "events", dataset)
    rows = rows_of(
        build_examples.transform(
            events=came, impressions=shown_rows, state=nothing["sequences"].drop("ds"),
            aggregates=nothing["aggregates"], item_aggregates=None, dataset=dataset, ds=DS,
        )
    )  # fmt: skip
    found: dict[tuple, int] = {}
    for ds in (DS, DAYS[2]):
        labels = build_labels.transform(
            examples={DS: frame(spark, rows, "examples", dataset)}, impressions={DS: shown_rows},
            events=came, dataset=dataset, ds=ds,
        )  # fmt: skip
        assert labels is not None
        for answer in rows_of(labels):
            (row,) = [r for r in rows if r["user_id"] == answer["user_id"]]
            for number, name, value in zip(
                row["targets__target_id"], row["targets__target"], answer["labels"], strict=True
            ):
                if value >= 0:
                    found[answer["task"], answer["user_id"], number, name] = value
    wanted = {("clicked", r["user_id"], r["target_id"], int(r["target"] == "visit")): r["label__clicked"]
              for r in impressions}  # fmt: skip
    wanted |= {("answered", u, n, 0): int((u, n) == (1, ids[1])) for u in (1, 2) for n in ids}
    assert found == wanted


def test_a_sum_that_float32_cannot_hold_is_its_largest_number(spark) -> None:
    assert TINY.streams[0].attribute("price").kind is Kind.NUMERIC
    most = [event(i, "click", i % 2, NOON + i, price=(-1) ** i * 3e38) for i in range(4)]
    rows = rows_of(build_aggregates.transform(frame(spark, most, "events"), TINY, DS))
    assert {r["user_id"]: r["dense__spent"] for r in rows} == {0: MAX_FLOAT32, 1: -MAX_FLOAT32}


def test_predictions_carry_the_ids_of_the_source(tmp_path: Path) -> None:
    spec = replace(synthetic.dataset(user_id_type=IdType.STRING), target_id_type=IdType.STRING)
    numbered = synthetic.tables(replace(spec, target_id_type=IdType.INT64), days=2, users=9)
    table = numbered["examples"][synthetic.FIRST_DAY]
    at = table.schema.get_field_index("targets__target_id")
    ids = pc.cast(table["targets__target_id"], pa.list_(pa.string()))
    table = table.set_column(at, contract(spec, "examples").schema.field(at), ids)
    count = sum(map(len, ids.to_pylist()))
    labels = np.full((count, 2), NO_LABEL, np.int32)
    labels[::2, 0] = 1
    rows = unpacked_rows(spec, table, labels=labels).labelled()
    scored = [
        labelled_predictions(spec, rows, lo, hi, batch, np.full((batch.targets, 2), 0.5))
        for lo, hi in cuts(rows, Limits(max_targets=3))
        for batch in [rows.batch(lo, hi)]
    ]
    write_evaluation(spec, concat(scored), tmp_path / "all.parquet")
    write_evaluation(spec, concat([]), tmp_path / "none.parquet")
    written = pq.read_table(tmp_path / "all.parquet")
    pairs = [
        (u, t)
        for u, of in zip(table["user_id"].to_pylist(), ids.to_pylist(), strict=True)
        for t in of
    ]
    found = list(zip(written["user_id"].to_pylist(), written["target_id"].to_pylist(), strict=True))
    assert found == pairs[::2] and len(scored) > 2
    assert pq.read_schema(tmp_path / "none.parquet") == written.schema
