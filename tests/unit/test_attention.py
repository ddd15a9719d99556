"""The fast prefix attention against the plain one, in float64, on jagged shapes of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.attention import prefix_attention, prefix_attention_reference, recency_bucket
from tests.attention import gradients, problem

SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=5)


@settings(max_examples=25)
@given(SIZES, st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_it_equals_the_reference(sizes, recency, null, seed) -> None:
    given_ = problem(sizes, recency=recency, null=null, seed=seed)
    torch.testing.assert_close(
        prefix_attention(**given_), prefix_attention_reference(**given_), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("prefix", ["random", "none", "all"])
@pytest.mark.parametrize("null", [True, False])
def test_its_gradients_equal_those_of_the_reference(prefix: str, null: bool) -> None:
    sizes = [(0, 5), (3, 0), (21, 30), (1, 1), (2, 17), (0, 0)]
    given_ = problem(sizes, prefix=prefix, null=null)
    ours = gradients(prefix_attention, given_)
    plain = gradients(prefix_attention_reference, given_)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("recency", [True, False])
def test_pointwise_weights_and_their_gradients_equal_those_of_the_reference(recency: bool) -> None:
    sizes = [(0, 5), (3, 0), (21, 30), (1, 1), (2, 17), (0, 0)]
    given_ = problem(sizes, recency=recency, pointwise=20.0)
    torch.testing.assert_close(
        prefix_attention(**given_), prefix_attention_reference(**given_), rtol=1e-9, atol=1e-12
    )
    ours = gradients(prefix_attention, given_)
    plain = gradients(prefix_attention_reference, given_)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_pointwise_attention_takes_no_null_slot() -> None:
    given_ = problem([(1, 2)])
    with pytest.raises(ValueError, match="null is for a softmax"):
        prefix_attention(**{**given_, "pointwise": 2.0})


def test_a_row_longer_than_every_bucket_is_whole() -> None:
    given_ = problem([(2, 1500)], prefix="all", heads=(2, 2))
    torch.testing.assert_close(prefix_attention(**given_), prefix_attention_reference(**given_))


def test_causal_self_attention_is_the_textbook_one() -> None:
    given_ = problem([(9, 9)], heads=(2, 2), recency=False, null=False)
    given_["kv_end"] = torch.arange(1, 10)
    expected = F.scaled_dot_product_attention(
        *(given_[x].transpose(0, 1)[None] for x in "qkv"), is_causal=True
    )
    torch.testing.assert_close(prefix_attention(**given_), expected[0].transpose(0, 1))


def test_without_keys_a_query_gets_the_null_value_or_zeros() -> None:
    given_ = problem([(2, 4), (1, 0)], prefix="none", heads=(2, 2))
    expected = given_["null"].value.expand(3, 2, 3)
    torch.testing.assert_close(prefix_attention(**given_), expected)
    without = prefix_attention(**{**given_, "null": None})
    assert torch.equal(without, torch.zeros_like(without))


def test_keys_beyond_the_prefix_change_nothing_to_the_bit() -> None:
    given_ = problem([(5, 12), (3, 20)])
    row = torch.repeat_interleave(torch.arange(2), torch.tensor([12, 20]))
    place = torch.arange(32) - given_["kv_offsets"][row]
    longest = torch.stack([given_["kv_end"][:5].max(), given_["kv_end"][5:].max()])
    hidden = place >= longest[row]
    assert hidden.any()
    other = dict(given_)
    for name in ("k", "v"):
        other[name] = torch.where(hidden[:, None, None], 1e6, given_[name])
    assert torch.equal(prefix_attention(**given_), prefix_attention(**other))


def test_recency_buckets_are_two_per_doubling() -> None:
    seconds = torch.tensor([0, 0.4, 1, 1.5, 2, 4, 3600, 1e12, -5])
    buckets = recency_bucket((seconds * 1e6).long())
    assert buckets.tolist() == [0, 0, 2, 3, 4, 6, 25, 63, 0]


def test_a_batch_without_any_key_works() -> None:
    given_ = problem([(2, 0), (1, 0)])
    torch.testing.assert_close(prefix_attention(**given_), prefix_attention_reference(**given_))


def test_head_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        prefix_attention(**problem([(1, 1)], heads=(3, 2)))
