"""Embeddings come back as they were published, from one snapshot, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_store import quality
from feature_store.embeddings import (
    EmbeddingKind,
    UserEmbeddings,
    decode,
    encode,
    pooled,
    published_rows,
    read_embeddings,
)
from feature_store.errors import DataError, MissingPartitionError
from feature_store.lake import Lake
from feature_store.spec import IdType
from feature_store.tables import contract
from tests.synthetic import dataset

SPEC = dataset()
DAYS = ["2024-05-01", "2024-05-02", "2024-05-03"]
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 4))


def _day(ids: list[int], values: list[float], ds: str = DAYS[0]) -> UserEmbeddings:
    return UserEmbeddings(
        model="sum",
        ds=ds,
        kind=EmbeddingKind.RAW,
        snapshot="s",
        ids=pa.array(ids, pa.int64()),
        values=np.array(values, dtype=np.float16).reshape(-1, 1, 1),
    )


@given(hnp.arrays(np.float16, SHAPES, elements=st.floats(-60000, 60000, width=16)))
def test_decoding_gives_back_what_was_encoded(values: np.ndarray) -> None:
    column = encode(values)
    n, count, dim = values.shape
    assert all(len(v) == count * dim * 2 for v in column.to_pylist())
    np.testing.assert_array_equal(decode(column, count, dim), values)
    np.testing.assert_array_equal(decode(column.slice(n // 2), count, dim), values[n // 2 :])
    twice = pa.chunked_array([*column.chunks, *column.chunks])
    np.testing.assert_array_equal(decode(twice, count, dim), np.concatenate([values, values]))


def test_bytes_are_little_endian_halves_embedding_by_embedding() -> None:
    value = np.array([[[1.0, 2.0], [-2.0, 0.5]]])
    assert encode(value).to_pylist() == [b"\x00\x3c\x00\x40\x00\xc0\x00\x38"]


def test_decoding_copies_nothing() -> None:
    column = encode(np.ones((4, 2, 3)))
    data = np.frombuffer(column.chunk(0).buffers()[2], dtype=np.float16)
    assert np.shares_memory(decode(column, 2, 3), data)


def test_what_float16_cannot_hold_is_refused() -> None:
    for bad in (np.nan, np.inf, 70000.0):
        values = np.ones((3, 1, 2))
        values[1, 0, 1] = bad
        with pytest.raises(DataError, match="embedding of row 1 is not finite in float16"):
            encode(values)
    with pytest.raises(DataError, match=r"shape \(3, 2\): give \(users, K, D\)"):
        encode(np.ones((3, 2)))
    with pytest.raises(DataError, match="not 6 bytes long, as 1 x 3 float16 are"):
        decode(encode(np.ones((3, 1, 2))), 1, 3)


def test_pooled_is_the_mean_over_the_days_that_the_user_has() -> None:
    today = np.array([3.0, 6.0, 9.0]).reshape(-1, 1, 1)
    yesterday = _day([1, 2], [1.0, 2.0], DAYS[1])
    before = _day([2, 5], [1.0, 100.0])
    values, days = pooled(np.array([1, 2, 4]), today, [yesterday, before])
    assert values.reshape(-1).tolist() == [2.0, 3.0, 9.0]
    assert days.tolist() == [2, 3, 1]
    assert values.dtype == np.float16 and days.dtype == np.int32


def test_pooling_is_computed_in_float32() -> None:
    """The sum of three float16 of 40000 is beyond float16; their mean is not."""
    users = np.array([1])
    values, _ = pooled(users, np.full((1, 1, 1), 40000.0), [_day([1], [40000.0])] * 2)
    assert values.item() == np.float16(40000.0)


def test_days_of_another_shape_or_pooled_already_are_not_pooled() -> None:
    wide = np.ones((1, 1, 2))
    with pytest.raises(
        DataError, match=r"are \(1, 1\), today's \(1, 2\): publish a model of another"
    ):
        pooled(np.array([1]), wide, [_day([1], [1.0])])
    with pytest.raises(DataError, match="are pooled: pool raw ones"):
        done = replace(_day([1], [1.0]), kind=EmbeddingKind.POOLED)
        pooled(np.array([1]), np.ones((1, 1, 1)), [done])


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake", SPEC)


def _publish(lake: Lake, ds: str, ids: list, values: np.ndarray, before=(), model="sum"):
    rows = published_rows(
        lake.dataset, model=model, ds=ds, snapshot=f"{model}-{ds}", user_ids=np.array(ids), raw=values, before=before
    )  # fmt: skip
    more = {"inputs": {}, "model": model, "code_version": "v1"}
    return lake.publish_arrow("user_embeddings", ds, rows, **more)


def test_a_reader_gets_one_models_day_in_every_form(lake: Lake) -> None:
    raw = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    made = _publish(lake, DAYS[0], [7, 9, 8], raw)
    _publish(lake, DAYS[0], [1], np.ones((1, 1, 1)), model="sequence")
    first = read_embeddings(lake, "sum", DAYS[0], "raw")
    _publish(lake, DAYS[1], [9, 10], raw[:2] + 4, before=[first])

    assert first.user_ids.tolist() == [7, 9, 8] and len(first) == 3
    assert first.snapshot == f"sum-{DAYS[0]}" and first.version == made.version
    np.testing.assert_array_equal(first.numpy(), raw)
    assert first.numpy().dtype == np.float16 and first.numpy(np.float32).dtype == np.float32
    assert first.torch().dtype == torch.float16 and first.torch(torch.float32).shape == (3, 2, 2)
    assert first.arrow().column("embedding").to_pylist()[1] == [4.0, 5.0, 6.0, 7.0]
    frame = first.pandas()
    assert frame.columns.tolist() == ["e0_0", "e0_1", "e1_0", "e1_1"]
    assert frame.loc[8].tolist() == [8.0, 9.0, 10.0, 11.0]

    found = read_embeddings(lake, "sum", DAYS[1])
    assert found.kind is EmbeddingKind.POOLED
    values, present = found.lookup([10, 7, 9, 9])
    assert present.tolist() == [True, False, True, True]
    assert not values[1].any()
    np.testing.assert_array_equal(values[2], (raw[1] + raw[0] + 4) / 2)
    np.testing.assert_array_equal(values[2], values[3])


def test_string_ids_are_looked_up_as_well(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake", dataset(user_id_type=IdType.STRING))
    _publish(lake, DAYS[0], ["ann", "bob"], np.arange(2.0).reshape(2, 1, 1))
    values, present = read_embeddings(lake, "sum", DAYS[0]).lookup(["bob", "eve"])
    assert present.tolist() == [True, False] and values[0].item() == 1.0


def test_a_day_that_was_not_published_or_has_nobody_is_an_error(lake: Lake) -> None:
    with pytest.raises(
        MissingPartitionError, match=r"of model sum has no partition for 2024-05-01"
    ):
        read_embeddings(lake, "sum", DAYS[0])
    _publish(lake, DAYS[0], [], np.empty((0, 2, 2)))
    with pytest.raises(DataError, match="has no users"):
        read_embeddings(lake, "sum", DAYS[0])
    with pytest.raises(DataError, match="kind is 'mean': use raw or pooled"):
        read_embeddings(lake, "sum", DAYS[0], "mean")


@pytest.mark.parametrize(
    ("column", "value"), [("snapshot", "other"), ("dim", 1), ("embeddings", 3)]
)
def test_a_partition_that_mixes_snapshots_or_shapes_is_an_error(
    lake: Lake, column: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = published_rows(
        SPEC, model="sum", ds=DAYS[0], snapshot="s", user_ids=np.array([1, 2]), raw=np.ones((2, 1, 2))
    )  # fmt: skip
    field = contract(SPEC, "user_embeddings").schema.field(column)
    values = [*rows.column(column).to_pylist()[:1], value]
    at = rows.schema.get_field_index(column)
    mixed = rows.set_column(at, field, pa.array(values, field.type))
    # written around the gate, which refuses it
    monkeypatch.setattr(quality, "validate", lambda *args, **kwargs: None)
    lake.publish_arrow("user_embeddings", DAYS[0], mixed, inputs={}, model="sum", code_version="v1")
    with pytest.raises(DataError, match=f"mixes {column} .*publish the day again"):
        read_embeddings(lake, "sum", DAYS[0])


def test_an_earlier_version_can_be_pinned(lake: Lake) -> None:
    old = _publish(lake, DAYS[0], [1], np.ones((1, 1, 1)))
    _publish(lake, DAYS[0], [1], np.full((1, 1, 1), 2.0))
    assert read_embeddings(lake, "sum", DAYS[0]).numpy().item() == 2.0
    assert read_embeddings(lake, "sum", DAYS[0], version=old.version).numpy().item() == 1.0
