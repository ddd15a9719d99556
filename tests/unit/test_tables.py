"""The contracts follow from the spec."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from feature_store import datasets
from feature_store.columns import missing_value
from feature_store.errors import SpecError
from feature_store.ledger import LEDGER
from feature_store.pipeline import JOBS
from feature_store.spec import IdType
from feature_store.tables import KINDS, contract, contracts
from tests.synthetic import dataset

SPECS = [dataset(), dataset(user_id_type=IdType.STRING), *map(datasets.get, datasets.names())]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}-{s.user_id_type}")
def test_every_table_has_its_key_and_partition_columns_once_and_required(spec) -> None:
    for name, table in contracts(spec).items():
        assert table.name == name and table.grain
        assert len(set(table.schema.names)) == len(table.schema.names)
        assert table.partitioned_by[-1] == "ds"
        for column in (*table.key, *table.partitioned_by):
            assert not table.schema.field(column).nullable, (name, column)
        assert KINDS[name].job in JOBS  # a missing partition can say which job writes it


def test_user_and_item_ids_have_the_types_of_the_spec() -> None:
    spec = dataset(user_id_type=IdType.STRING)
    for table in ("events", "impressions", "sequences", "aggregates", "examples"):
        assert contract(spec, table).schema.field("user_id").type == pa.string()
    assert contract(spec, "impressions").schema.field("item_id").type == pa.int64()


def test_examples_hold_history_features_and_targets_but_no_label() -> None:
    names = contract(dataset(), "examples").schema.names
    assert "history__clicks__price" in names
    assert "targets__history_end__likes" in names
    assert "targets__context__surface" in names
    assert "sparse__liked__scores" in names and "sparse__clicked__scores" not in names
    assert not [
        n
        for n in names
        if "label" in n or (n.endswith(("clicked", "bought")) and "sparse" not in n)
    ]


def test_packed_columns_are_lists_that_may_not_be_null() -> None:
    schema = contract(dataset(), "examples").schema
    assert schema.field("history__likes__image").type == pa.list_(pa.list_(pa.float32()))
    for field in schema:
        if field.name.startswith(("history__", "targets__", "sparse__")):
            assert pa.types.is_list(field.type) and not field.nullable


def test_optional_tables_follow_the_spec() -> None:
    spec = dataset()
    assert "item_aggregates" in contracts(spec) and "truth" not in contracts(spec)
    assert "item_aggregates" not in contracts(replace(spec, item_features=None))
    assert "truth" in contracts(replace(spec, simulated=True))
    with pytest.raises(SpecError, match="table is 'truth': synthetic has events"):
        contract(spec, "truth")


def test_missing_values_are_those_of_their_kind() -> None:
    attributes = {a.name: a for a in dataset().event_attributes}
    assert missing_value(attributes["category"]) == -1
    assert missing_value(replace(attributes["category"], id_type=IdType.STRING)) == ""
    price = missing_value(attributes["price"])
    assert price != price
    assert missing_value(attributes["image"]) == [0.0, 0.0, 0.0]


def test_what_the_ledger_has_always_held_is_never_null() -> None:
    # what an earlier release wrote has no definition and no identity
    assert [f.name for f in LEDGER if f.nullable] == ["definition", "identity"]
