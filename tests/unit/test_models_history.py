"""Counts, matches and the served prefix against plain loops; numbers and time encodings."""

from __future__ import annotations

import math

import pytest
import torch

from feature_store.days import DAY_US, HOUR_US, add_days, day_of, start_us
from models.axes import blocks, length
from models.batch import Batch
from models.clock import gap_bucket, phases
from models.features import TARGET_ITEM, feature_plan
from models.history import (
    bag_match_blocks,
    bag_match_numbers,
    candidate_ids,
    match_blocks,
    match_numbers,
    stream_numbers,
    target_pairs,
    visible_pairs,
)
from models.numbers import Standardise
from models.publishing import RecencyBags
from models.reader import newest_events
from models.upstream.sequence import served_prefix
from tests.batches import random_batch
from tests.tiny import TINY

PLAN = feature_plan(TINY)
NAN = float("nan")


@pytest.fixture
def batch() -> Batch:
    return random_batch(TINY, rows=8, events=10, targets=4, ids=4)


def visible(batch: Batch, target: int) -> range:
    start = int(batch.event_offsets[batch.row_of_target[target]])
    return range(start, start + int(batch.history_end[target]))


def counted(batch: Batch, events: list[int], at: int) -> tuple[float, float]:
    newest = max((int(batch.event_time[e]) for e in events), default=None)
    return len(events), NAN if newest is None else (at - newest) / 60e6


def test_the_plan_shares_vocabularies_and_keeps_the_order_of_the_spec() -> None:
    assert [c.name for c in PLAN.candidates] == [TARGET_ITEM, "place"]
    assert {c.name: c.vocabulary for c in PLAN.event_ids}["article"] == "item"
    assert PLAN.event_numbers == ("price",) and PLAN.event_vectors == (("topic", 2),)
    (match,) = PLAN.matches
    assert (match.candidate, match.name, match.streams) == (TARGET_ITEM, "article", (0, 1))
    assert {m.name for m in PLAN.bag_matches} == {"clicked", "viewed"}


def test_stream_and_match_numbers_equal_a_loop(batch: Batch) -> None:
    pairs = target_pairs(batch)
    streams = stream_numbers(batch, pairs, batch.as_of, PLAN)
    matches = match_numbers(batch, pairs, PLAN)
    assert (
        streams.shape == (batch.targets, 4) and matches.shape[1] == length(match_blocks(PLAN)) == 4
    )
    some = 0
    for t in range(batch.targets):
        at, item = int(batch.as_of[t]), int(batch.item_id[t])
        expected, matched = [], []
        for s in (0, 1):
            seen = [e for e in visible(batch, t) if batch.event_stream[e] == s]
            same = [e for e in seen if item != -1 and batch.event_ids["article"][e] == item]
            expected.append(counted(batch, seen, at))
            matched.append(counted(batch, same, at))
            some += len(same)
        for found, wanted in ((streams[t], expected), (matches[t], matched)):
            plain = torch.tensor([w[0] for w in wanted] + [w[1] for w in wanted])
            torch.testing.assert_close(found, plain, equal_nan=True, check_dtype=False)
    assert some > 10


def test_matches_with_sparse_features_equal_a_loop(batch: Batch) -> None:
    found = bag_match_numbers(batch, PLAN)
    assert found.shape[1] == length(bag_match_blocks(PLAN))
    hits = 0
    for t in range(batch.targets):
        row, wanted = int(batch.row_of_target[t]), []
        for match in PLAN.bag_matches:
            values, offsets, scores = batch.sparse[match.name]
            mine = slice(int(offsets[row]), int(offsets[row + 1]))
            ids = values[mine].tolist()
            item = int(candidate_ids(batch, match.candidate)[t])
            if item not in ids:
                wanted += [0.0, NAN, NAN]
                continue
            hits += 1
            # random bags may repeat an id (real ones do not): any of its places will do
            places = [i for i, value in enumerate(ids) if value == item]
            place = int(found[t, len(wanted) + 1])
            assert place in places
            wanted += [1.0, place, 1.0 if scores is None else float(scores[mine][place])]
        torch.testing.assert_close(found[t], torch.tensor(wanted), equal_nan=True)
    assert hits > 3


def test_the_served_prefix_is_what_the_nightly_job_had(batch: Batch) -> None:
    end, at = served_prefix(batch, PLAN)
    assert 0 < end.sum() < batch.events
    for row in range(batch.rows):
        as_of = int(batch.as_of[batch.target_offsets[row]])
        ds = day_of(as_of, TINY.utc_offset)
        cutoff = start_us(ds, TINY.utc_offset) - HOUR_US  # TINY.serve_delay
        assert int(at[row]) == cutoff
        mine = slice(int(batch.event_offsets[row]), int(batch.event_offsets[row + 1]))
        assert int(end[row]) == int((batch.event_available[mine] < cutoff).sum())
        assert day_of(cutoff, TINY.utc_offset) == add_days(ds, -1)


def test_bags_equal_a_loop(batch: Batch) -> None:
    torch.manual_seed(0)
    bags = RecencyBags(PLAN, scale=2.0)
    with torch.no_grad():
        bags.stream.copy_(torch.randn(1, 2))
        bags.log_rate.fill_(0.3)
    ((name, index),) = bags.attributes
    embeddings = [torch.randn(batch.events, 8) for _ in PLAN.event_ids]
    end, at = served_prefix(batch, PLAN)
    pairs = visible_pairs(batch.event_offsets, torch.arange(batch.rows), end)
    found = bags(batch, embeddings, pairs, at)
    for row in range(batch.rows):
        start = int(batch.event_offsets[row])
        total, count = torch.zeros(8), 1.0
        for e in range(start, start + int(end[row])):
            if batch.event_ids[name][e] == -1:
                continue
            days = (int(at[row]) - int(batch.event_time[e])) / DAY_US
            stream = bags.stream[0, int(batch.event_stream[e])].item()
            weight = math.exp(stream - days * math.exp(0.3))
            total, count = total + weight * embeddings[index][e], count + weight
        torch.testing.assert_close(found[row, 0], 2 * total / count)
    assert (found == 0).all(dim=2).any() and (found != 0).any()


def test_standardised_numbers_have_unit_size_and_missing_ones_are_zero() -> None:
    torch.manual_seed(0)
    module = Standardise(blocks("ab"))
    data = torch.stack([torch.rand(4000).mul(12).exp(), torch.randn(4000) * 1e-3], dim=1)
    for part in data.split(500):
        module(part)
    module.eval()
    out = module(data)
    assert out.mean(0).abs().max() < 0.2
    assert (out.std(0) - 1).abs().max() < 0.9
    gaps = torch.tensor([[NAN, 1.0], [5.0, NAN]])
    assert module(gaps)[0, 0] == 0 and module(gaps)[1, 1] == 0
    assert torch.equal(module(gaps, torch.tensor([False, False])), torch.zeros(2, 2))
    assert module(torch.tensor([[1e30, -1e30]])).abs().max() <= module.limit


def test_without_the_logarithm_only_place_and_scale_are_taken_out() -> None:
    torch.manual_seed(0)
    data = torch.randn(1000, 3) * torch.tensor([0.5, 2.0, 7.0]) + torch.tensor([5.0, -3.0, 0.0])
    module = Standardise(blocks("abc"), log=False)
    module(data)
    out = module.eval()(data)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    other = Standardise(blocks("abc"), log=False)
    other(data * 4 + 1)
    torch.testing.assert_close(other.eval()(data * 4 + 1), out, atol=1e-4, rtol=1e-4)


def test_numbers_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    module = Standardise(blocks("a"))
    for _ in range(3):
        module(torch.rand(50, 1))
    module.eval()
    row = torch.tensor([[0.7]])
    beside = torch.cat([row, torch.full((9, 1), 1e6)])
    assert torch.equal(module(row), module(beside)[:1])


def test_phases_repeat_by_day_and_week_and_gaps_double() -> None:
    now = torch.tensor([19_800 * DAY_US + 5 * HOUR_US])
    torch.testing.assert_close(phases(now), phases(now + 7 * DAY_US), atol=1e-5, rtol=0)
    assert not torch.allclose(phases(now), phases(now + DAY_US), atol=1e-2)
    noon, midnight = phases(torch.tensor([DAY_US // 2])), phases(torch.tensor([0]))
    torch.testing.assert_close(noon[0, 0], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(noon[0, 1], -midnight[0, 1])
    gaps = torch.tensor([-5, 0, 1_000_000, 2_000_000, 5_000_000, 10**18])
    assert gap_bucket(gaps).tolist() == [0, 0, 1, 2, 3, 31]
    assert math.isfinite(float(phases(torch.tensor([0])).sum()))


def test_the_newest_events_are_the_last_of_each_target_s_prefix(batch: Batch) -> None:
    events = torch.randn(batch.events, 3)
    found = newest_events(events, batch, 2).unflatten(1, (2, 3))
    lengths = set()
    for t in range(batch.targets):
        seen = visible(batch, t)
        lengths.add(min(len(seen), 3))
        for back in range(2):
            wanted = events[seen[-1 - back]] if len(seen) > back else torch.zeros(3)
            assert torch.equal(found[t, back], wanted)
    assert lengths >= {0, 1, 3}
