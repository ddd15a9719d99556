"""A contradiction in a spec fails when it is built, naming the field, the value and the remedy."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import product

import pytest

from feature_store import datasets
from feature_store.errors import SpecError
from feature_store.pipeline import stages
from feature_store.spec import (
    Aggregate,
    Attribute,
    Dataset,
    DenseFeature,
    EventLabel,
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
from feature_store.tables import contracts

ITEM = Attribute(name="article", vocabulary="item")
PRICE = Attribute(name="price", kind=Kind.NUMERIC)
CLICKS = EventStream(name="clicks", attributes=(ITEM, PRICE), max_events=8)
LIKES = EventStream(name="likes", attributes=(Attribute(name="page"),), max_events=8)
VIEW = Target(name="view", context=(Attribute(name="device"),))
CLICK = Task(name="click", label=GivenLabel(column="clicked"), targets=("view",))
SPEC = Dataset(
    name="news",
    first_day="2024-05-01",
    streams=(CLICKS, LIKES),
    targets=(VIEW,),
    tasks=(CLICK,),
    domain="device",
)


def _matched(ours: str, theirs: str) -> Task:
    label = EventLabel(stream="clicks", within=timedelta(hours=1), match=((ours, theirs),))
    return replace(CLICK, label=label, matures_after=1)


def test_a_consistent_spec_is_accepted_and_knows_its_parts() -> None:
    assert SPEC.stream("likes") is LIKES
    assert SPEC.task("click") is CLICK
    assert [a.name for a in SPEC.event_attributes] == ["article", "price", "page"]
    assert [c.name for c in SPEC.context_features] == ["device"]
    assert SPEC.given_labels == ("clicked",)
    assert SPEC.window_days == 1


@pytest.mark.parametrize(
    ("part", "arguments", "message"),
    [
        (Attribute, {"name": "Price"}, r"Attribute.name is 'Price': use lower-case"),
        (Attribute, {"name": "a__b"}, r"Attribute.name is 'a__b'.*'__' separates"),
        (Attribute, {"name": "1st"}, r"Attribute.name is '1st'"),
        (Attribute, {"name": ""}, r"Attribute.name is ''"),
        (Attribute, {"name": "v", "kind": Kind.VECTOR}, r"\(v\).dim is None: a vector needs its"),
        (Attribute, {"name": "v", "kind": Kind.VECTOR, "dim": 0}, r"\(v\).dim is 0: a vector"),
        (Attribute, {"name": "a", "dim": 3}, r"\(a\).dim is 3: only a vector"),
        (
            Attribute,
            {"name": "a", "vocabulary": "a b"},
            r"\(a\).vocabulary is 'a b': use lower-case",
        ),
        (Attribute, {"name": "a", "clip": (0.0, 1.0)}, r"\(a\).clip is .*: ids are not clipped"),
        (
            Attribute,
            {"name": "a", "kind": Kind.NUMERIC, "clip": (1.0, 1.0)},
            r"\(a\).clip is \(1.0, 1.0\): give the lowest and the highest",
        ),
        (
            Attribute,
            {"name": "a", "kind": Kind.NUMERIC, "clip": (0.0, 1e39)},
            r"\(a\).clip is .*: .* both finite in float32",
        ),
        (GivenLabel, {"column": "Clicked?"}, r"GivenLabel.column is 'Clicked\?': use lower-case"),
        (EventStream, {"name": "A", "attributes": (), "max_events": 1}, r"EventStream.name is 'A'"),
        (
            EventStream,
            {"name": "s", "attributes": (), "max_events": 0},
            r"\(s\).max_events is 0: keep at least one",
        ),
        (
            EventStream,
            {"name": "s", "attributes": (), "max_events": 1, "delay": timedelta(seconds=-1)},
            r"\(s\).delay is .*: a delay is not negative",
        ),
        (
            EventStream,
            {"name": "s", "attributes": (PRICE, PRICE), "max_events": 1},
            r"\(s\).attributes is 'price': the name is used twice",
        ),
        (
            EventStream,
            {"name": "s", "attributes": (PRICE,), "max_events": 1, "id_from": ("cost",)},
            r"\(s\).id_from is 'cost': not declared; known are user_id, event_time, event_id, price",
        ),
        (Target, {"name": "T"}, r"Target.name is 'T'"),
        (Target, {"name": "t", "context": (PRICE, PRICE)}, r"\(t\).context is 'price'.*twice"),
        (
            Target,
            {"name": "t", "context": (Attribute(name="v", kind=Kind.VECTOR, dim=2),)},
            r"\(t\).context is 'v': context is categorical or numeric",
        ),
        (Target, {"name": "t", "id_from": ("x",)}, r"\(t\).id_from is 'x': not declared"),
        (
            UserAttribute,
            {"name": "U", "stream": "s", "attribute": "a"},
            r"UserAttribute.name is 'U'",
        ),
        (
            SparseFeature,
            {"name": "s", "stream": "s", "attribute": "a", "window_days": 0, "max_ids": 1},
            r"\(s\).window_days is 0: use 1 day or more",
        ),
        (
            SparseFeature,
            {"name": "s", "stream": "s", "attribute": "a", "window_days": 1, "max_ids": 0},
            r"\(s\).max_ids is 0: use 1 id or more",
        ),
        (
            DenseFeature,
            {"name": "d", "stream": "s", "aggregate": Aggregate.COUNT, "window_days": 0},
            r"\(d\).window_days is 0",
        ),
        (
            DenseFeature,
            {"name": "d", "stream": "s", "aggregate": Aggregate.SUM, "window_days": 1},
            r"\(d\).attribute is None: sum needs the attribute",
        ),
        (
            DenseFeature,
            {
                "name": "d",
                "stream": "s",
                "aggregate": Aggregate.COUNT,
                "window_days": 1,
                "attribute": "a",
            },
            r"\(d\).attribute is 'a': sum needs",
        ),
        (
            DenseFeature,
            {"name": "d", "stream": "s", "aggregate": Aggregate.RATE, "window_days": 1},
            r"\(d\).per is None: rate needs",
        ),
        (
            DenseFeature,
            {
                "name": "d",
                "stream": "s",
                "aggregate": Aggregate.RECENCY,
                "window_days": 1,
                "per": "x",
            },
            r"\(d\).per is 'x': rate needs",
        ),
        (ItemFeatures, {"streams": (), "windows_hours": (1,)}, r"ItemFeatures.streams is \(\)"),
        (
            ItemFeatures,
            {"streams": (("s", "a"),), "windows_hours": (0,)},
            r"windows_hours is 0: use 1 hour",
        ),
        (
            Task,
            {"name": "T", "label": GivenLabel(column="c"), "targets": ("t",)},
            r"Task.name is 'T'",
        ),
        (
            Task,
            {
                "name": "t",
                "label": GivenLabel(column="c"),
                "targets": ("t",),
                "matures_after": -1,
            },
            r"\(t\).matures_after is -1: use 0 days or more",
        ),
        (
            Task,
            {
                "name": "t",
                "label": EventLabel(stream="s", within=timedelta(hours=25)),
                "targets": ("t",),
                "matures_after": 1,
            },
            r"\(t\).matures_after is 1: an event may come .* later; make it 2 days",
        ),
    ],
)
def test_a_part_that_contradicts_itself_is_refused(
    part: type, arguments: dict, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        part(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "News"}, r"Dataset.name is 'News'"),
        ({"name": "n" * 101}, r"Dataset.name is 'n+': it names folders and files: use at most 100"),
        ({"name": "news_downstream"}, r"Dataset.name is 'news_downstream': a DAG of it could have"),
        ({"name": "a_downstream_b"}, r"Dataset.name is 'a_downstream_b': .* without the word"),
        ({"first_day": "01.05.2024"}, r"first_day is '01.05.2024': write it as YYYY-MM-DD"),
        ({"streams": ()}, r"streams is \(\): declare at least one stream"),
        ({"targets": ()}, r"targets is \(\): declare what is scored"),
        ({"tasks": ()}, r"tasks is \(\): declare at least one task"),
        ({"models": ()}, r"models is \(\): name at least one"),
        ({"models": ("sum", "sum")}, r"models is 'sum': the name is used twice"),
        ({"utc_offset": timedelta(days=1)}, r"utc_offset is .*: less than a day"),
        ({"serve_delay": timedelta(days=1)}, r"serve_delay is .*: 0 up to less than a day"),
        ({"serve_delay": timedelta(seconds=-1)}, r"serve_delay is"),
        ({"held_out_share": 0.0}, r"held_out_share is 0.0: a share between"),
        ({"held_out_share": 0.5}, r"held_out_share is 0.5"),
        ({"max_part_rows": 1}, r"max_part_rows is 1: use 2 or more"),
        ({"base_days": 0}, r"base_days is 0: use 1 day or more"),
        ({"streams": (CLICKS, CLICKS)}, r"streams is 'clicks': the name is used twice"),
        ({"targets": (VIEW, VIEW)}, r"targets is 'view': the name is used twice"),
        ({"tasks": (CLICK, CLICK)}, r"tasks is 'click': the name is used twice"),
        ({"domain": "surface"}, r"domain is 'surface': not declared; known are device"),
        (
            {"user_attributes": (UserAttribute(name="home", stream="x", attribute="page"),)},
            r"UserAttribute\(home\).stream is 'x': not declared; known are clicks, likes",
        ),
        (
            {"user_attributes": (UserAttribute(name="home", stream="likes", attribute="x"),)},
            r"UserAttribute\(home\).attribute is 'x': not declared; known are page",
        ),
        (
            {"user_attributes": (UserAttribute(name="home", stream="clicks", attribute="price"),)},
            r"\(home\).attribute is 'price': it has to be categorical",
        ),
        (
            {
                "dense_features": (
                    DenseFeature(
                        name="d",
                        stream="clicks",
                        aggregate=Aggregate.SUM,
                        window_days=1,
                        attribute="article",
                    ),
                )
            },
            r"DenseFeature\(d\).attribute is 'article': it has to be numeric",
        ),
        (
            {
                "dense_features": (
                    DenseFeature(
                        name="d",
                        stream="clicks",
                        aggregate=Aggregate.RATE,
                        window_days=1,
                        per="views",
                    ),
                )
            },
            r"DenseFeature\(d\).per is 'views': not declared",
        ),
        (
            {
                "user_attributes": (UserAttribute(name="page", stream="likes", attribute="page"),),
                "sparse_features": (
                    SparseFeature(
                        name="page", stream="likes", attribute="page", window_days=1, max_ids=1
                    ),
                ),
            },
            r"user features is 'page': the name is used twice",
        ),
        (
            {"item_features": ItemFeatures(streams=(("views", "article"),), windows_hours=(1,))},
            r"ItemFeatures.streams is 'views': not declared",
        ),
        (
            {"item_features": ItemFeatures(streams=(("likes", "page"),), windows_hours=(1,))},
            r"ItemFeatures.streams\[likes\] is 'page': not declared; known are none",
        ),
        (
            {"targets": (replace(VIEW, context=(Attribute(name="as_of"),)),), "domain": None},
            r"view.as_of is 'as_of': the name is a column of ours",
        ),
        (
            {
                "streams": (
                    CLICKS,
                    replace(LIKES, attributes=(Attribute(name="price"),)),
                )
            },
            r"likes.price is .*declared otherwise before",
        ),
        (
            {"item_id_type": IdType.STRING},
            r"Attribute\(article\).id_type is .*vocabulary 'item' has string",
        ),
        ({"tasks": (replace(CLICK, targets=()),)}, r"Task\(click\).targets is \(\): name the"),
        ({"tasks": (replace(CLICK, targets=("x",)),)}, r"targets is 'x': not declared; .*view"),
        (
            {"domain": None, "tasks": (replace(CLICK, domain=1),)},
            r"Task\(click\).domain is 1: the dataset declares no domain feature",
        ),
        (
            {
                "tasks": (
                    replace(
                        CLICK,
                        label=EventLabel(stream="views", within=timedelta(hours=1)),
                        matures_after=1,
                    ),
                )
            },
            r"label.stream is 'views': not declared; known are clicks, likes",
        ),
        (
            {
                "tasks": (
                    replace(
                        CLICK,
                        label=EventLabel(
                            stream="clicks", within=timedelta(hours=1), match=(("x", "article"),)
                        ),
                        matures_after=1,
                    ),
                )
            },
            r"label.match is 'x': not declared; known are target_id, item_id, device",
        ),
        (
            {
                "tasks": (
                    replace(
                        CLICK,
                        label=EventLabel(
                            stream="clicks", within=timedelta(hours=1), match=(("item_id", "x"),)
                        ),
                        matures_after=1,
                    ),
                )
            },
            r"label.match is 'x': not declared; known are article",
        ),
        (
            {"target_id_type": IdType.STRING, "targets": (replace(VIEW, id_from=("time",)),)},
            r"target_id_type is .*: Target\(view\).id_from makes numbers; use INT64",
        ),
        (
            {"target_id_type": IdType.STRING, "tasks": (_matched("target_id", "article"),)},
            r"match is \('target_id', 'article'\): target_id is string and article int64; store them alike",
        ),
        (
            {
                "tasks": (_matched("item_id", "article"),),
                "targets": (replace(VIEW, has_item=False),),
            },
            r"label.match is 'item_id': not declared; known are target_id, device",
        ),
        (
            {"tasks": (_matched("item_id", "price"),)},
            r"label.match is 'price': not declared; known are article",
        ),
        (
            {"tasks": (replace(CLICK, domain="feed"),)},
            r"domain is 'feed': device is int64; write it",
        ),
        (
            {"targets": (replace(VIEW, context=(replace(PRICE, name="device"),)),)},
            r"domain is 'device': not declared; known are none",
        ),
        (
            {"tasks": (replace(CLICK, label=GivenLabel(column="device")),)},
            r"GivenLabel.column is 'device': the name is a column of ours, or a context feature",
        ),
        (
            {"item_features": ItemFeatures(streams=(("clicks", "article"),), windows_hours=(6, 6))},
            r"a column of examples is 'targets__item__clicks_6h': the name is used twice",
        ),
        (
            {
                "streams": (CLICKS, replace(CLICKS, name="clicks_share")),
                "item_features": ItemFeatures(
                    streams=(("clicks", "article"), ("clicks_share", "article")), windows_hours=(1,)
                ),
            },
            r"a column of examples is 'targets__item__clicks_share_1h': the name is used twice",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(SPEC, **change)


def test_names_of_our_columns_beside_raw_ones_are_refused_and_no_others() -> None:
    """Derived from the contracts: every column of `events` and `impressions` that no spec names."""
    plain = replace(
        SPEC, streams=(replace(CLICKS, attributes=()),), targets=(Target(name="view"),), domain=None
    )
    tables = contracts(plain)
    columns = {n for t in ("events", "impressions") for n in tables[t].schema.names}
    for name in {n for t in tables.values() for n in t.schema.names} | {
        "part",
        "value",
        "class",
        "a" * 300,
    }:
        if "__" in name:
            continue  # no name of a spec has that
        attribute = Attribute(name=name)
        for change in (
            {"streams": (replace(CLICKS, attributes=(attribute,)),)},
            {"targets": (Target(name="view", context=(attribute,)),)},
            {"tasks": (replace(CLICK, label=GivenLabel(column=name)),)},
        ):
            if name in columns:
                with pytest.raises(SpecError, match=f"is '{name}': the name is a column of ours"):
                    replace(plain, **change)
            else:
                replace(plain, **change)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sumn", r"Dataset\(news\).models has 'sumn', .* did you mean 'sum'. known are sum, seq"),
        ("sum_regularize", "did you mean 'sum_regularise'"),
        (
            "sum_feed",
            "a new one gets an entry in feature_store/presets/news.toml",
        ),  # another dataset's
        ("", "known are"),
    ],
)
def test_a_model_that_there_is_not_is_refused_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        replace(SPEC, models=("sum", name))
    assert replace(SPEC, models=("sum", "sum_distil", "hybrid")).models


def test_an_unknown_task_attribute_or_dataset_is_named_with_what_there_is() -> None:
    with pytest.raises(SpecError, match="task is 'buy': news has click"):
        SPEC.task("buy")
    with pytest.raises(SpecError, match=r"EventStream\(likes\) has no attribute 'price'"):
        LIKES.attribute("price")
    with pytest.raises(SpecError, match=r"dataset is 'nowhere': known are .*simulated"):
        datasets.get("nowhere")


@pytest.mark.parametrize("name", datasets.names())
def test_every_dataset_of_the_house_builds(name: str) -> None:
    assert datasets.get(name).name == name


def test_the_hash_follows_what_models_depend_on_and_nothing_else() -> None:
    again = replace(SPEC)
    assert again.hash == SPEC.hash
    for same in ({"description": "other"}, {"models": ("hybrid",)}):
        assert replace(SPEC, **same).hash == SPEC.hash
    for other in (
        {"serve_delay": timedelta(hours=1)},
        {"held_out_share": 0.2},
        {"max_part_rows": 8},
        {"streams": (replace(CLICKS, max_events=9), LIKES)},
        {"streams": (LIKES, CLICKS)},
        {"tasks": (replace(CLICK, matures_after=1),)},
    ):
        assert replace(SPEC, **other).hash != SPEC.hash


def test_item_feature_names_are_in_stored_order() -> None:
    features = ItemFeatures(streams=(("clicks", "article"),), windows_hours=(1, 24))
    assert features.names == (
        "clicks_1h",
        "clicks_share_1h",
        "clicks_24h",
        "clicks_share_24h",
        "age_h",
    )


def test_no_two_datasets_have_a_dag_or_an_asset_of_one_name() -> None:
    words = ("a", "downstream", "ingest")
    names = ["_".join(name) for n in (1, 2, 3) for name in product(words, repeat=n)]
    tasks = tuple(replace(CLICK, name=name) for name in names)
    owner: dict[str, str] = {}
    for name in names:
        try:
            dataset = replace(SPEC, name=name, tasks=tasks)
        except SpecError:
            continue
        for stage in stages(dataset):
            for taken in (stage.dag_id, *stage.emits):
                assert owner.setdefault(taken, name) == name, taken
    assert {"a", "downstream", "downstream_ingest", "ingest_a"} < set(owner.values())
