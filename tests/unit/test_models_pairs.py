"""The pair encoder: a pair at a time, nothing beyond a target's prefix, and nothing where there is none."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.features import feature_plan
from models.history import Pairs, target_pairs
from models.pairs import PairEncoder
from tests.batches import random_batch
from tests.synthetic import dataset

SPEC = dataset()
PLAN = feature_plan(SPEC)


def _encoder() -> PairEncoder:
    torch.manual_seed(0)
    encoder = PairEncoder(PLAN, heads=3, width=5)
    torch.nn.init.normal_(encoder.bias.weight)  # it starts at 0
    encoder(random_batch(SPEC, seed=9, rows=6), target_pairs(random_batch(SPEC, seed=9, rows=6)))
    return encoder.eval()


def test_the_summary_is_the_soft_maximum_of_a_target_s_own_pairs():
    batch, encoder = random_batch(SPEC, seed=1, rows=5), _encoder()
    pairs = target_pairs(batch)
    bias, related = encoder(batch, pairs)
    assert bias.shape == (len(pairs.query), 3) and related.shape == (batch.targets, 5)
    first = 0
    for t, end in enumerate(batch.history_end.tolist()):
        own = slice(first, first + end)
        # alone in a batch of pairs, with its own rows of pair_numbers and its own place among them
        alone = replace(
            batch,
            pair_numbers=batch.pair_numbers[own],
            history_end=torch.where(torch.arange(batch.targets) == t, batch.history_end, 0),
        )
        one = Pairs(pairs.query[own], pairs.event[own], batch.targets)
        lonely_bias, lonely = encoder(alone, one)
        torch.testing.assert_close(lonely_bias, bias[own])
        torch.testing.assert_close(lonely[t], related[t])
        if end == 0:
            assert not related[t].any()
        first += end
    assert (batch.history_end == 0).any() and (related > 0).any()


def test_what_a_target_does_not_see_changes_nothing():
    batch, encoder = random_batch(SPEC, seed=2, rows=5), _encoder()
    _, related = encoder(batch, target_pairs(batch))
    seen = torch.zeros(batch.events, dtype=torch.bool)
    seen[target_pairs(batch).event] = True
    assert not seen.all()
    poisoned = replace(
        batch,
        event_time=torch.where(seen, batch.event_time, batch.event_time + 10**12),
        event_stream=torch.where(seen, batch.event_stream, 1 - batch.event_stream),
        event_ids={k: torch.where(seen, v, 77) for k, v in batch.event_ids.items()},
    )
    assert torch.equal(encoder(poisoned, target_pairs(poisoned))[1], related)


def test_the_bias_starts_at_zero_so_that_attention_starts_without_it():
    batch = random_batch(SPEC, seed=3, rows=4)
    bias, _ = PairEncoder(PLAN, heads=2)(batch, target_pairs(batch))
    assert not bias.any()


def test_distance_of_ids_is_a_number_only_where_ids_have_an_order():
    plain = feature_plan(
        replace(SPEC, item_features=replace(SPEC.item_features, ordered_ids=False))
    )
    batch = random_batch(SPEC, seed=4, rows=4)
    with_distance = _encoder()._numbers(batch, target_pairs(batch))
    without = PairEncoder(plain, heads=1)._numbers(batch, target_pairs(batch))
    assert with_distance.shape[1] == without.shape[1] + 1
    pairs = target_pairs(batch)
    item, ad = batch.item_id[pairs.query], batch.event_ids["ad"][pairs.event]
    both = (item != -1) & (ad != -1)
    distance = with_distance[:, len(PLAN.pair_numbers)]
    assert torch.equal(distance[both], (item - ad).abs().float()[both])
    assert distance[~both].isnan().all()
