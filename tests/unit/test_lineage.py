"""What a partition is made from decides its identity, and a partition that no longer is that is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.content import content_hash
from feature_store.errors import MissingPartitionError, StalePartitionError
from feature_store.ledger import Partition
from feature_store.lineage import Lineage
from feature_store.spec import Attribute, DenseFeature, EventLabel, Kind
from feature_store.tables import SOURCES, definition, feature_tables
from tests.tiny import DAYS, TINY

FEATURES = feature_tables(TINY)


class Ledger:
    """A ledger in memory, written in the order in which jobs would."""

    def __init__(self, dataset=TINY) -> None:
        self.dataset = dataset
        self.rows: list[Partition] = []

    @property
    def lineage(self) -> Lineage:
        return Lineage(self.dataset, lambda table: [r for r in self.rows if r.table == table])

    def write(self, table: str, ds: str, content: str = "", inputs: tuple[str, ...] = ()) -> None:
        lineage = self.lineage
        read = {key: lineage._pinned(key).version for key in inputs}
        self.rows.append(
            Partition(
                table=table, model="", ds=ds, version=len(self.rows), inputs=read, code_version="",
                definition=definition(self.dataset, table), engine="", rows=0, bytes=0, seconds=0.0,
                identity=lineage.identity(table, ds, content), written_at=len(self.rows), notes={},
            )
        )  # fmt: skip

    def build(self, ds: str) -> None:
        earlier = ds > DAYS[0]
        before = DAYS[DAYS.index(ds) - 1]
        chain = (f"sequences/{before}",) if earlier else ()
        self.write("sequences", ds, inputs=(f"events/{ds}", *chain))
        self.write("aggregates", ds, inputs=(f"events/{ds}",))
        self.write("item_aggregates", ds, inputs=(f"events/{ds}", *chain))
        served = (f"aggregates/{before}",) if earlier else ()
        read = (f"events/{ds}", f"impressions/{ds}", f"item_aggregates/{ds}", *chain, *served)
        self.write("examples", ds, inputs=read)
        self.write("labels", ds, inputs=(f"examples/{ds}",))

    def stale(self) -> set[tuple[str, str]]:
        lineage = self.lineage
        return {(t, d) for t in (*SOURCES[:2], *FEATURES) for d in lineage.stale_days(t)}


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    for ds in DAYS:
        made.write("events", ds, f"events of {ds}")
        made.write("impressions", ds, f"impressions of {ds}")
    for ds in DAYS:
        made.build(ds)
    return made


def test_what_was_built_in_order_is_current(ledger: Ledger) -> None:
    assert ledger.stale() == set()


def test_the_same_rows_again_leave_everything_current(ledger: Ledger) -> None:
    ledger.write("events", DAYS[1], f"events of {DAYS[1]}")
    ledger.write("sequences", DAYS[1], inputs=(f"events/{DAYS[0]}", f"events/{DAYS[1]}"))  # in full
    assert ledger.stale() == set()


def test_a_corrected_source_makes_stale_exactly_what_depends_on_it(ledger: Ledger) -> None:
    ledger.write("events", DAYS[1], "corrected")
    after = DAYS[1:]
    assert ledger.stale() == {
        *((t, d) for t in ("sequences", "item_aggregates", "examples", "labels") for d in after),
        # windows of three days less an hour reach into four partitions
        *(("aggregates", d) for d in DAYS[1:5]),
    }
    with pytest.raises(
        StalePartitionError,
        match=rf"tiny.sequences {DAYS[1]} \(version \d+\) was made from events/{DAYS[1]} version 2, which "
        rf"\d+ replaced: run make run DATASET=tiny.* python -m jobs build_sequences --dataset tiny --ds {DAYS[1]}",
    ):
        ledger.lineage.require("sequences", [DAYS[3]])
    for ds in after:
        ledger.build(ds)
    assert ledger.stale() == set()


def test_impressions_touch_their_own_day_and_the_labels_that_mature_from_it(ledger: Ledger) -> None:
    ledger.write("impressions", DAYS[1], "corrected")
    assert ledger.stale() == {
        ("examples", DAYS[1]), ("labels", DAYS[1]), ("labels", DAYS[2])
    }  # fmt: skip


def test_an_earlier_day_that_is_written_later_is_noticed() -> None:
    made = Ledger()
    for ds in DAYS[1:3]:
        made.write("events", ds, ds)
        made.write("impressions", ds, ds)
    made.rows[0] = replace(made.rows[0])
    for table in FEATURES:
        made.write(table, DAYS[2])
    assert made.stale() == set()
    made.write("events", DAYS[0], "late")
    assert {t for t, _ in made.stale()} == set(FEATURES)
    with pytest.raises(StalePartitionError, match=f"made without events/{DAYS[0]}"):
        made.lineage.require("examples", [DAYS[2]])


def test_an_input_that_is_replaced_while_a_job_computes_is_noticed(ledger: Ledger) -> None:
    inputs = {f"events/{DAYS[2]}": 4, f"sequences/{DAYS[1]}": 15}
    ledger.lineage.check_inputs("sequences", DAYS[2], inputs)
    ledger.write("events", DAYS[2], f"events of {DAYS[2]}")  # the same rows: nothing is lost
    ledger.lineage.check_inputs("sequences", DAYS[2], inputs)
    ledger.write("events", DAYS[0], "corrected")
    with pytest.raises(
        StalePartitionError, match=f"sequences {DAYS[2]} is made from sequences/{DAYS[1]}"
    ):
        ledger.lineage.check_inputs("sequences", DAYS[2], inputs)
    with pytest.raises(StalePartitionError, match=r"events/.* version 0, which \d+ replaced"):
        ledger.lineage.check_inputs("sequences", DAYS[2], {f"events/{DAYS[0]}": 0})


def test_a_day_that_was_not_written_is_named_with_the_job_that_writes_it(ledger: Ledger) -> None:
    with pytest.raises(MissingPartitionError, match="2030-01-01: run python -m jobs build_labels"):
        ledger.lineage.require("labels", ["2030-01-01"])


CLICK, VIEW = TINY.streams
_DENSE = DenseFeature(name="views_2d", stream="view", aggregate="count", window_days=2)
_LATER = replace(TINY.tasks[2], label=EventLabel(stream="click", within=timedelta(hours=5)))


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"description": "other", "models": ("sum",)}, set()),
        ({"dense_features": TINY.dense_features[::-1]}, set()),  # an order decides no row
        ({"sparse_features": TINY.sparse_features[::-1]}, set()),
        ({"held_out_share": 0.2}, set()),
        ({"base_days": 2}, set()),
        ({"dense_features": (*TINY.dense_features, _DENSE)}, {"aggregates", "examples", "labels"}),
        ({"serve_delay": timedelta(hours=2)}, {"aggregates", "examples", "labels"}),
        ({"max_part_rows": 6}, {"examples", "labels"}),
        ({"tasks": (*TINY.tasks[:2], _LATER, TINY.tasks[3])}, {"labels"}),
        ({"tasks": TINY.tasks[::-1]}, set()),
        (
            {"item_features": replace(TINY.item_features, windows_hours=(2, 31))},
            {"examples", "labels"},
        ),
        (
            {"item_features": replace(TINY.item_features, co_occurrence=None)},
            {"item_aggregates", "examples", "labels"},
        ),
        (
            {"streams": (CLICK, replace(VIEW, max_events=5))},
            {"sequences", "examples", "labels"},
        ),
        (
            {"streams": (CLICK, replace(VIEW, delay=timedelta(minutes=1)))},
            {"events", *FEATURES},
        ),
        (
            {
                "streams": (
                    replace(CLICK, attributes=(*CLICK.attributes, Attribute(name="more"))), VIEW,
                )
            },
            {"events", *FEATURES},
        ),
        (
            {
                "targets": (
                    replace(
                        TINY.targets[0],
                        context=(*TINY.targets[0].context, Attribute(name="bid_2", kind=Kind.NUMERIC)),
                    ),
                    TINY.targets[1],
                )
            },
            {"impressions", "examples", "labels"},
        ),
    ],
)  # fmt: skip
def test_a_change_of_the_spec_touches_the_tables_that_it_decides_and_no_other(
    change: dict, touched: set[str]
) -> None:
    changed = replace(TINY, **change)
    tables = ("events", "impressions", *FEATURES)
    assert {t for t in tables if definition(TINY, t) != definition(changed, t)} == touched


def _table(rows: list[tuple]) -> pa.Table:
    schema = pa.schema(
        [("i", pa.int64()), ("s", pa.string()), ("x", pa.float32()), ("v", pa.list_(pa.float32()))]
    )
    return pa.Table.from_pylist([dict(zip("isxv", r, strict=True)) for r in rows], schema=schema)


_ROWS = st.lists(
    st.tuples(
        st.none() | st.integers(-3, 3),
        st.none() | st.sampled_from(["", "a", "b", "\0"]),
        st.none() | st.floats(width=32, allow_nan=True) | st.sampled_from([0.0, -0.0]),
        st.none() | st.lists(st.none() | st.integers(-1, 1).map(float), max_size=3),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(one=_ROWS, other=_ROWS, seed=st.integers(0, 99))
def test_two_bags_of_rows_have_one_content_hash_where_they_are_equal_and_only_there(
    one: list[tuple], other: list[tuple], seed: int
) -> None:
    shuffled = random.Random(seed).sample(one, len(one))
    table, again = _table(one), _table(shuffled).select(["v", "x", "s", "i"])
    pieces = pa.concat_tables([again.slice(0, 1), again.slice(1)])
    assert content_hash(pads.dataset(table)) == content_hash(pads.dataset(pieces))

    def bag(rows: list[tuple]) -> list[str]:
        return sorted(str([np.float32(v).tobytes() if isinstance(v, float) and v == v else v
                           for v in r]) for r in _table(rows).to_pylist() for r in [list(r.values())])  # fmt: skip

    if bag(one) != bag(other):
        assert content_hash(pads.dataset(table)) != content_hash(pads.dataset(_table(other)))
