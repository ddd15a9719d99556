"""A small made-up lake in Arrow, true to the contracts: for tests of what reads tables.

Users click on ads of the category that they liked last; a day later some buy what they clicked.
Everything is computed naively, one user at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pyarrow as pa

from feature_store.days import DAY_US, HOUR_US, add_days, day_range, end_us, parse_day, start_us
from feature_store.ledger import Partition
from feature_store.lineage import Lineage
from feature_store.spec import (
    Aggregate,
    Attribute,
    CoOccurrence,
    Dataset,
    DenseFeature,
    EventStream,
    GivenLabel,
    IdType,
    ItemFeatures,
    Kind,
    SparseFeature,
    Target,
    Task,
    UserAttribute,
)
from feature_store.tables import contract, definition

FIRST_DAY = "2024-05-01"


def dataset(*, user_id_type: IdType = IdType.INT64, name: str = "synthetic") -> Dataset:
    """Two streams with every kind of attribute, two tasks of which one matures a day later."""
    category = Attribute(name="category")
    ad = Attribute(name="ad", vocabulary="item")
    price = Attribute(name="price", kind=Kind.NUMERIC)
    image = Attribute(name="image", kind=Kind.VECTOR, dim=3)
    return Dataset(
        name=name,
        first_day=FIRST_DAY,
        utc_offset=timedelta(hours=-3),
        serve_delay=timedelta(hours=1),
        user_id_type=user_id_type,
        held_out_share=0.2,
        streams=(
            EventStream(name="likes", attributes=(category, image), max_events=8),
            EventStream(name="clicks", attributes=(ad, category, price), max_events=6),
        ),
        targets=(
            Target(name="impression", context=(Attribute(name="surface"), category, price)),
        ),
        user_attributes=(UserAttribute(name="favourite", stream="likes", attribute="category"),),
        sparse_features=(
            SparseFeature(name="liked", stream="likes", attribute="category", window_days=2, max_ids=4, scored=True),
            SparseFeature(name="clicked", stream="clicks", attribute="ad", window_days=2, max_ids=4),
        ),
        dense_features=(
            DenseFeature(name="likes_1d", stream="likes", aggregate=Aggregate.COUNT, window_days=1),
            DenseFeature(name="likes_2d", stream="likes", aggregate=Aggregate.COUNT, window_days=2),
        ),
        item_features=ItemFeatures(
            streams=(("clicks", "ad"),),
            windows_hours=(24,),
            co_occurrence=CoOccurrence(
                stream="clicks", attribute="ad", beside=("category",), before=("ad", "category")
            ),
            ordered_ids=True,
        ),
        domain="surface",
        tasks=(
            Task(name="click", label=GivenLabel(column="clicked"), targets=("impression",)),
            Task(name="buy", label=GivenLabel(column="bought"), targets=("impression",), matures_after=1),
        ),
        max_part_rows=16,
    )  # fmt: skip


_TABLES = ("impressions", "examples", "labels", "aggregates", "sequences", "item_aggregates")


def tables(
    spec: Dataset, *, days: int, users: int, seed: int = 0, categories: int = 4, ads: int = 24
) -> dict[str, dict[str, pa.Table]]:
    """What a loader reads, and impressions, of `days` days: table -> ds -> rows."""
    rng = random.Random(seed)
    last = add_days(FIRST_DAY, days - 1)
    out: dict[str, dict[str, list[dict]]] = {
        t: {d: [] for d in day_range(FIRST_DAY, last)} for t in _TABLES
    }
    next_target = iter(range(1, 10**9))
    for number in range(users):
        user = number if spec.user_id_type is IdType.INT64 else f"user-{number}"
        _one_user(spec, user, rng, days, categories, ads, next_target, out)
    for ds, rows in out["item_aggregates"].items():
        rows += _item_aggregates(spec, ds, rng, categories, ads)
    return {
        table: {d: pa.Table.from_pylist(rows, schema=contract(spec, table).schema) for d, rows in by.items()}
        for table, by in out.items()
    }  # fmt: skip


def _item_aggregates(spec, ds, rng, categories, ads) -> list[dict]:
    """Counts of every third ad and hour, made up: whatever they are, lookups have to find them."""
    first = start_us(ds, spec.utc_offset)
    rows = []
    for ad in range(ads):
        for hour in range(first // HOUR_US, first // HOUR_US + 24):
            if rng.random() < 0.7:
                continue
            row = {"item_id": ad, "hour": hour, "events__clicks": 3, "first_seen": first, "ds": ds}
            for column, values in (
                ("beside__category", categories),
                ("before_1__ad", ads),
                ("before_20__ad", ads),
                ("before_1__category", categories),
                ("before_20__category", categories),
            ):
                row[column] = sorted(rng.sample(range(values), rng.randrange(4)))
                row[f"{column}__counts"] = [rng.randrange(1, 9) for _ in row[column]]
            rows.append(row)
    return rows


def _one_user(spec, user, rng, days, categories, ads, next_target, out) -> None:
    history: list[dict] = []
    favourite = rng.randrange(categories)
    for ds in day_range(FIRST_DAY, add_days(FIRST_DAY, days - 1)):
        start = start_us(ds, spec.utc_offset)
        moments = sorted(start + rng.randrange(24) * HOUR_US for _ in range(rng.randrange(4, 14)))
        today, targets = [], []
        for at in moments:
            if rng.random() < 0.1:
                favourite = rng.randrange(categories)
            if rng.random() < 0.4:
                today.append(_event(spec, "likes", at, category=favourite, rng=rng))
                continue
            ad = rng.randrange(ads)
            category = ad % categories
            click = int(rng.random() < (0.75 if category == favourite else 0.1))
            buy = int(click and rng.random() < 0.5)
            targets.append(
                {"target_id": next(next_target), "time": at, "as_of": at, "item_id": ad,
                 "surface": rng.randrange(2), "category": category,
                 "price": rng.choice([float("nan"), 1.5]), "click": click, "buy": buy}
            )  # fmt: skip
            if click:
                today.append(
                    _event(spec, "clicks", at + HOUR_US // 60, category=category, ad=ad, rng=rng)
                )
        today = [e for e in today if e["available_time"] < start + DAY_US]
        day = {"user": user, "ds": ds, "history": history, "today": today, "targets": targets}
        _write_examples(spec, day, out)
        history = sorted([*history, *today], key=lambda e: _order(spec, e))
        _write_state(spec, user, ds, history, bool(today), out)


def _event(spec, stream, at, *, category, rng, ad=None) -> dict:
    return {"stream": stream, "event_id": rng.randrange(1 << 40), "event_time": at,
            "available_time": at + rng.choice([0, 0, HOUR_US]), "category": category, "ad": ad,
            "price": rng.choice([float("nan"), 2.0, 3.5]), "image": [rng.random() for _ in range(3)]}  # fmt: skip


def _order(spec, event) -> tuple:
    streams = [s.name for s in spec.streams]
    return event["available_time"], streams.index(event["stream"]), event["event_id"]


def _packed_history(spec, base, own, *, event_id=False) -> dict:
    columns = {}
    for stream in spec.streams:
        kept = [e for e in base if e["stream"] == stream.name][-stream.max_events :]
        kept += [e for e in own if e["stream"] == stream.name]
        names = ["event_time", "available_time", *(a.name for a in stream.attributes)]
        for name in (*names, *(["event_id"] if event_id else [])):
            columns[f"history__{stream.name}__{name}"] = [e[name] for e in kept]
    return columns


def _features(spec, history, cutoff) -> dict | None:
    seen = [e for e in history if cutoff - 2 * DAY_US <= e["available_time"] < cutoff]
    if not seen:
        return None
    likes = [e for e in seen if e["stream"] == "likes"]
    counts: dict[int, int] = {}
    for event in likes:
        counts[event["category"]] = counts.get(event["category"], 0) + 1
    top = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:4]
    clicked = list(dict.fromkeys(e["ad"] for e in reversed(seen) if e["stream"] == "clicks"))[:4]
    return {
        "user__favourite": likes[-1]["category"] if likes else -1,
        "sparse__liked": [k for k, _ in top],
        "sparse__liked__scores": [float(v) for _, v in top],
        "sparse__clicked": clicked,
        "dense__likes_1d": float(sum(e["available_time"] >= cutoff - DAY_US for e in likes)),
        "dense__likes_2d": float(len(likes)),
    }


_NO_FEATURES = {"user__favourite": -1, "sparse__liked": [], "sparse__liked__scores": [],
                "sparse__clicked": [], "dense__likes_1d": float("nan"),
                "dense__likes_2d": float("nan")}  # fmt: skip


def _cutoff(spec, ds) -> int:
    return end_us(ds, spec.utc_offset) - spec.serve_delay // timedelta(microseconds=1)


def _write_examples(spec, day, out) -> None:
    user, ds, history, targets = day["user"], day["ds"], day["history"], day["targets"]
    features = _features(spec, history, _cutoff(spec, add_days(ds, -1)))
    timeline = sorted(
        [(t["as_of"], 0, i, "target", t) for i, t in enumerate(targets)]
        + [(e["available_time"], 1, _order(spec, e), "event", e) for e in day["today"]],
        key=lambda x: x[:3],
    )
    cap = spec.max_part_rows
    seen = sorted(history, key=lambda e: _order(spec, e))
    part = 0
    for lo in range(0, len(timeline), cap):
        mine = timeline[lo : lo + cap]
        own = [x[4] for x in mine if x[3] == "event"]
        shown = [x[4] for x in mine if x[3] == "target"]
        packed = _packed_history(spec, seen, own)
        if shown:
            _write_part(spec, user, ds, part, features, packed, shown, out)
            part += 1
        seen = [*seen, *own]


def _write_part(spec, user, ds, part, features, packed, shown, out) -> None:
    row = {"user_id": user, "part": part, "has_aggregates": int(features is not None),
           **(features or _NO_FEATURES), **packed, "ds": ds,
           "targets__target_id": [t["target_id"] for t in shown],
           "targets__target": [0] * len(shown)}  # fmt: skip
    for name in ("time", "as_of", "item_id"):
        row[f"targets__{name}"] = [t[name] for t in shown]
    for name in ("surface", "category", "price"):
        row[f"targets__context__{name}"] = [t[name] for t in shown]
    for name in spec.item_features.names:
        row[f"targets__item__{name}"] = [(t["item_id"] % 7) / 7 for t in shown]
    for stream in spec.streams:
        available = packed[f"history__{stream.name}__available_time"]
        row[f"targets__history_end__{stream.name}"] = [
            sum(a < t["as_of"] for a in available) for t in shown
        ]
    out["examples"][ds].append(row)
    for task in spec.tasks:
        final = add_days(ds, task.matures_after)
        if final in out["labels"]:
            out["labels"][final].append(
                {"user_id": user, "shown_ds": ds, "part": part, "task": task.name,
                 "labels": [t[task.name] for t in shown], "ds": final}
            )  # fmt: skip
    for t in shown:
        out["impressions"][ds].append(
            {"target_id": t["target_id"], "target": "impression", "user_id": user, "time": t["time"],
             "as_of": t["as_of"], "item_id": t["item_id"], "surface": t["surface"],
             "category": t["category"], "price": None, "label__clicked": t["click"],
             "label__bought": t["buy"], "ds": ds}
        )  # fmt: skip


def _write_state(spec, user, ds, history, touched, out) -> None:
    base = (parse_day(ds) - parse_day(FIRST_DAY)).days % spec.base_days == 0
    if history and (touched or base):
        out["sequences"][ds].append(
            {"user_id": user, **_packed_history(spec, history, [], event_id=True), "ds": ds}
        )
    features = _features(spec, history, _cutoff(spec, ds))
    if features is not None:
        out["aggregates"][ds].append({"user_id": user, **features, "ds": ds})


def publish(lake, rows: dict[str, dict[str, pa.Table]]) -> None:
    """What `tables` gave, into a lake; the first day's sequences are a base."""
    for table, by_day in rows.items():
        for ds, data in by_day.items():
            notes = {"base": table == "sequences" and ds == FIRST_DAY}
            lake.publish_arrow(table, ds, data, inputs={}, notes=notes, code_version="test")


class MemoryLake:
    """What of the lake a reader uses, over tables in memory."""

    def __init__(self, spec: Dataset, rows: dict[str, dict[str, pa.Table]]) -> None:
        self.dataset = spec
        self.rows = rows

    def lineage(self) -> Lineage:
        def rows(table: str) -> list[Partition]:
            made = definition(self.dataset, table)
            return [
                Partition(
                    table=table, model="", ds=ds, version=1, inputs={}, code_version="", definition=made,
                    identity=ds, engine="", rows=0, bytes=0, seconds=0.0, written_at=0, notes={},
                )
                for ds in self.rows.get(table, {})
            ]  # fmt: skip

        return Lineage(self.dataset, rows)

    def require(self, table: str, days: list[str], model: str = "") -> dict[str, int]:
        return {f"{table}/{d}": 1 for d in days if self.rows[table][d] is not None}

    def partitions(self, table: str, model: str = "") -> dict[str, SimpleNamespace]:
        return {d: SimpleNamespace(version=1, notes={}) for d in self.rows[table]}

    def read(self, table, *, days, columns=None, version=None, model=None) -> pa.Table:
        nothing = contract(self.dataset, table).schema.empty_table()
        found = pa.concat_tables([nothing, *(self.rows[table][d] for d in days)])
        return found if columns is None else found.select(columns)

    def batches(
        self, table, *, days, columns=None, version=None, batch_rows=1000
    ) -> Iterator[pa.RecordBatch]:
        yield from self.read(table, days=days, columns=columns).to_batches(max_chunksize=batch_rows)
