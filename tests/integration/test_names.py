"""Whatever a spec may call something, the tables, the models and what is published are the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema

from feature_store.days import add_days, day_range
from feature_store.embeddings import read_embeddings
from feature_store.lake import Lake
from feature_store.spec import Dataset
from feature_store.tables import contract
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
    ingest,
    publish_embeddings,
    report,
    train_downstream,
    train_upstream,
)
from jobs.context import JobContext
from jobs.settings import Settings
from jobs.sources import SourceDay
from tests import synthetic
from tests.differential import bits
from tests.names import (
    DAYS,
    back,
    free_names,
    plain,
    renaming,
    under,
    under_names,
    world,
)

pytestmark = pytest.mark.filterwarnings("ignore")
_BUILT = (
    "events",
    "impressions",
    "sequences",
    "aggregates",
    "item_aggregates",
    "examples",
    "labels",
)


def _rows(table: pa.Table) -> list[str]:
    """Rows in an order of their own, floats as bits. Ids of events are hashed with the stream's name."""
    columns = [n for n in table.schema.names if not n.endswith("event_id")]
    return sorted(bits(list(row.values())) for row in table.select(columns).to_pylist())


def _assert_same(got: pa.Table, want: pa.Table, what: str) -> None:
    assert want.num_rows, f"{what}: the world is too small to prove anything"
    ours, theirs = _rows(got), _rows(want)
    assert len(ours) == len(theirs), what
    for one, other in zip(ours, theirs, strict=True):
        assert one == other, what


# ---- the feature builders


def _transformed(spark, dataset: Dataset, events: pa.Table, shown: pa.Table) -> dict[str, pa.Table]:
    """The tables of the first day that read raw columns, by the transforms alone."""
    ds = DAYS[0]

    def frame(table: pa.Table) -> DataFrame:
        if not table.num_rows:
            return spark.createDataFrame([], from_arrow_schema(table.schema))
        return spark.createDataFrame(table)

    def nothing(table: str) -> DataFrame:
        return frame(contract(dataset, table).schema.empty_table())

    today, impressions = (frame(t.filter(pc.equal(t["ds"], ds))) for t in (events, shown))
    state = nothing("sequences").drop("ds")
    items = build_item_aggregates.transform(
        today, nothing("item_aggregates"), state, dataset, ds
    ).toArrow()
    examples = build_examples.transform(
        events=today,
        impressions=impressions,
        state=state,
        aggregates=nothing("aggregates"),
        item_aggregates=frame(items),
        dataset=dataset,
        ds=ds,
        unusual=build_examples.Unusual(busy_users=(), delivered_again=()),
    ).toArrow()
    labels = build_labels.transform(
        examples={ds: frame(examples)},
        impressions={ds: impressions},
        events=frame(events.filter(pc.less_equal(events["ds"], DAYS[1]))),
        dataset=dataset,
        ds=DAYS[1],
    )
    given = build_labels.transform(
        examples={ds: frame(examples)},
        impressions={ds: impressions},
        events=today,
        dataset=dataset,
        ds=ds,
    )
    assert labels is not None and given is not None
    return {
        "aggregates": build_aggregates.transform(today, dataset, ds).toArrow(),
        "item_aggregates": items,
        "examples": examples,
        "labels": labels.unionByName(given).toArrow(),
    }


def test_every_name_may_be_an_attribute_and_a_context_feature(spark) -> None:
    size = 64
    groups = [free_names()[i : i + size] for i in range(0, len(free_names()), size)]
    dataset = plain(size)
    events, shown = world(dataset, users=3, seed=0)
    want = _transformed(spark, dataset, events, shown)
    for seed, group in enumerate(groups):
        by = renaming(dataset, group, seed=seed)
        other = under(dataset, by)
        ours = (
            under_names(t, n, other, by) for n, t in (("events", events), ("impressions", shown))
        )
        for name, table in _transformed(spark, other, *ours).items():
            _assert_same(
                back(table, name, dataset, by), want[name], f"{name} of names like {group[0]}"
            )


# ---- all feature jobs


def _built(settings: Settings, dataset: Dataset, days: list[str], rows: tuple, monkeypatch):
    """`days` through the feature jobs; the tables.

    Args:
        rows: events and impressions.
    """
    events, shown = rows

    def day_of(spark, source, ds, spec) -> SourceDay:
        rows = {
            s.name: events.filter(
                pc.and_(pc.equal(events["stream"], s.name), pc.equal(events["ds"], ds))
            ).select(["event_id", "user_id", "event_time", *(a.name for a in s.attributes)])
            for s in spec.streams
        }
        targets = shown.filter(pc.equal(shown["ds"], ds)).drop_columns(["ds"])
        targets = targets.rename_columns([n.removeprefix("label__") for n in targets.schema.names])
        return SourceDay(
            events={name: spark.createDataFrame(table) for name, table in rows.items()},
            impressions=spark.createDataFrame(targets),
        )

    source = SimpleNamespace(NEEDS_SOURCE=False, read=day_of)
    monkeypatch.setattr(ingest.sources, "get", lambda name: source)
    for ds in days:
        context = JobContext(dataset=dataset, ds=ds, settings=settings)
        for job in (
            ingest,
            build_sequences,
            build_aggregates,
            build_item_aggregates,
            build_examples,
            build_labels,
        ):
            job.run(context)
        lake = context.lake
        context.close()
    return {name: lake.read(name, days=days) for name in _BUILT}


@pytest.mark.parametrize(("engine", "days"), [("sail", DAYS[:2]), ("spark", DAYS[:1])])
def test_every_feature_job_builds_the_same_tables_under_any_names(
    settings_of, engine, days, tmp_path, monkeypatch
) -> None:
    dataset = plain(6)
    events, shown = world(dataset, users=4, seed=1)
    wanted = ("hour", "value", "late", "problem", "outside", "position", "seen", "x_0", "select")
    by = renaming(dataset, wanted, seed=len(engine))
    other = under(dataset, by)
    ours = tuple(
        under_names(t, n, other, by) for n, t in (("events", events), ("impressions", shown))
    )
    # plain names on Sail in both cases: engines are slow to start, and agree
    plainly = replace(settings_of("sail"), lake_root=str(tmp_path / "plain"))
    settings = replace(settings_of(engine), lake_root=str(tmp_path / "other"))
    want = _built(plainly, dataset, days, (events, shown), monkeypatch)
    for name, table in _built(settings, other, days, ours, monkeypatch).items():
        _assert_same(back(table, name, dataset, by), want[name], name)


# ---- all that trains

_TRAINED = {
    "category": "keys", "ad": "values", "price": "float", "image": "type", "surface": "training",
    "likes": "pop", "clicks": "forward", "impression": "position", "favourite": "item",
    "liked": "half", "clicked": "items", "likes_1d": "event_id", "likes_2d": "labels",
    "click": "user_id", "buy": "z" * 60, "bought": "context",
}  # fmt: skip


def _published(settings: Settings, dataset: Dataset, rows: dict, days: list[str]) -> dict:
    lake = Lake(settings.lake_root, dataset)
    synthetic.publish(lake, rows)
    for ds in days:
        for model in dataset.models:
            context = JobContext(dataset=dataset, ds=ds, settings=settings, model=model)
            train_upstream.run(context)
            publish_embeddings.run(context)
    return {m: read_embeddings(lake, m, days[0]).numpy().tobytes() for m in dataset.models}


def test_what_is_trained_published_and_compared_is_the_same_under_any_names(
    tmp_path, monkeypatch
) -> None:
    dataset = synthetic.dataset()
    other = under(dataset, _TRAINED)
    days = day_range(synthetic.FIRST_DAY, add_days(synthetic.FIRST_DAY, 2))
    rows = synthetic.tables(dataset, days=len(days), users=15)

    def renamed(name: str, table: pa.Table) -> pa.Table:
        table = table.rename_columns(contract(other, name).schema.names)
        for column in {"task", "target"} & set(table.schema.names):
            values = pa.array([_TRAINED[v] for v in table[column].to_pylist()], pa.string())
            table = table.set_column(table.schema.get_field_index(column), column, values)
        return table.cast(contract(other, name).schema)

    others = {n: {ds: renamed(n, t) for ds, t in by_day.items()} for n, by_day in rows.items()}
    homes = [Settings.from_env({"HEADWATER_HOME": str(tmp_path / n)}) for n in ("plain", "other")]
    want = _published(homes[0], dataset, rows, days[:1])
    assert _published(homes[1], other, others, days) == want
    monkeypatch.setattr(train_downstream, "MIN_TRAIN_DAYS", 1)
    task = JobContext(dataset=other, ds=days[-1], settings=homes[1], task=other.tasks[0].name)
    train_downstream.run(task)
    report.run(task)
    assert (homes[1].report_dir(other.name) / "index.html").exists()
