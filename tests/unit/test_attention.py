"""The fast prefix attention against the plain one, in float64, on jagged shapes of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.attention import prefix_attention, prefix_attention_reference
from models.attention_inputs import position_bucket, recency_bucket
from models.history import visible_pairs
from tests.attention import FLAGS, gradients, problem

SIZES = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5)


@settings(max_examples=25)
@given(SIZES, FLAGS, st.integers(0, 10**6))
def test_it_equals_the_reference(sizes, flags, seed) -> None:
    given_ = problem(sizes, **flags, seed=seed)
    torch.testing.assert_close(
        prefix_attention(**given_), prefix_attention_reference(**given_), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("prefix", ["random", "none", "all"])
@pytest.mark.parametrize("null", [True, False])
def test_its_gradients_equal_those_of_the_reference(prefix: str, null: bool) -> None:
    sizes = [(0, 5), (3, 0), (21, 30), (1, 1), (2, 17), (0, 0), (70, 20)]
    given_ = problem(sizes, prefix=prefix, null=null)
    ours = gradients(prefix_attention, given_)
    plain = gradients(prefix_attention_reference, given_)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("biases", [True, False])
def test_pointwise_weights_and_their_gradients_equal_those_of_the_reference(biases: bool) -> None:
    sizes = [(0, 5), (3, 0), (21, 30), (1, 1), (2, 17), (0, 0)]
    given_ = problem(sizes, recency=biases, position=biases, pairs=biases, pointwise=20.0)
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


def test_gradients_repeat_to_the_bit() -> None:
    given_ = problem([(40, 300), (3, 9), (25, 60)])
    one, other = (gradients(prefix_attention, given_) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("pointwise", [None, 20.0])
def test_it_is_the_same_where_no_gradient_is_asked_for(pointwise: float | None) -> None:
    given_ = problem([(40, 300), (3, 9)], pointwise=pointwise)
    with torch.inference_mode():
        scored = prefix_attention(**given_)
    assert torch.equal(scored, prefix_attention(**given_).detach())


def test_bfloat16_is_as_close_as_bfloat16_is() -> None:
    given_ = problem([(6, 35), (3, 9)])
    narrow = {x: given_[x].bfloat16() for x in ("q", "k", "v", "pair_bias", "position_bias")}
    narrow["recency"] = given_["recency"]._replace(table=given_["recency"].table.float())
    narrow["null"] = type(given_["null"])(*(x.bfloat16() for x in given_["null"]))
    got = prefix_attention(**{**given_, **narrow})
    assert got.dtype == torch.bfloat16
    want = prefix_attention_reference(**given_)
    torch.testing.assert_close(got.double(), want, rtol=3e-2, atol=3e-2)


def test_causal_self_attention_is_the_textbook_one() -> None:
    given_ = problem([(9, 9)], heads=(2, 2), recency=False, position=False, pairs=False, null=False)
    given_["kv_end"] = torch.arange(1, 10)
    expected = F.scaled_dot_product_attention(
        *(given_[x].transpose(0, 1)[None] for x in "qkv"), is_causal=True
    )
    torch.testing.assert_close(prefix_attention(**given_), expected[0].transpose(0, 1))


def test_in_causal_self_attention_the_position_is_the_distance_to_the_key() -> None:
    given_ = problem([(50, 50)], heads=(2, 2), recency=False, pairs=False, null=False)
    given_["kv_end"] = torch.arange(1, 51)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    bias = given_["position_bias"][position_bucket(distance)].permute(2, 0, 1)  # (G, Q, N)
    bias = bias.masked_fill(distance < 0, float("-inf"))
    expected = F.scaled_dot_product_attention(
        *(given_[x].transpose(0, 1)[None] for x in "qkv"), attn_mask=bias[None]
    )
    torch.testing.assert_close(prefix_attention(**given_), expected[0].transpose(0, 1))


def test_a_pair_bias_lies_as_visible_pairs_do() -> None:
    given_ = problem([(4, 30), (0, 3), (20, 9)], recency=False, position=False, null=False)
    row = torch.repeat_interleave(torch.arange(3), given_["q_offsets"].diff())
    pairs = visible_pairs(given_["kv_offsets"], row, given_["kv_end"])
    chosen = torch.rand(len(pairs.query), generator=torch.Generator().manual_seed(1)) < 0.5
    given_["pair_bias"] = torch.where(chosen, 0.0, -1e30)[:, None].expand(-1, 4)
    mask = torch.full((24, 42), -1e30, dtype=torch.float64)
    mask[pairs.query[chosen], pairs.event[chosen]] = 0.0
    some = mask.max(1).values == 0.0
    k, v = (given_[x].repeat_interleave(2, 1).transpose(0, 1) for x in "kv")
    expected = F.scaled_dot_product_attention(given_["q"].transpose(0, 1), k, v, attn_mask=mask)
    found = prefix_attention(**given_)
    torch.testing.assert_close(found[some], expected.transpose(0, 1)[some])


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


def test_position_buckets_are_exact_and_then_four_per_doubling() -> None:
    newer = torch.arange(10_000)
    buckets = position_bucket(newer)
    assert buckets[:40].tolist() == [*range(32), *[32] * 8]
    floors = [int((buckets == b).nonzero()[0]) for b in range(64)]
    assert floors[32:44] == [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224]
    assert floors[63] == 7168 and (buckets.diff() >= 0).all()
    assert position_bucket(torch.tensor([-3, 2**40])).tolist() == [0, 63]


def test_a_batch_without_any_key_works() -> None:
    given_ = problem([(2, 0), (1, 0)])
    torch.testing.assert_close(prefix_attention(**given_), prefix_attention_reference(**given_))


def test_head_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        prefix_attention(**problem([(1, 1)], heads=(3, 2)))


@pytest.mark.parametrize("name", ["position_bias", "pair_bias"])
def test_a_bias_of_another_shape_is_refused(name: str) -> None:
    given_ = problem([(2, 5)], prefix="all")
    with pytest.raises(ValueError, match=rf"{name} is \(\d+, 4\), give \((64|10), 4\)"):
        prefix_attention(**{**given_, name: given_[name][:-1]})
