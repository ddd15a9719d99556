"""Pairs: one at a time, nothing beyond a target's prefix, and nothing where there is none; summaries."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.batch import Batch
from models.features import feature_plan
from models.history import Pairs, target_pairs
from models.numbers import HINGES
from models.pairs import PairEncoder, PairNumbers
from tests.batches import random_batch
from tests.synthetic import dataset

SPEC = dataset()
PLAN = feature_plan(SPEC)


class Both(torch.nn.Module):
    """The numbers of pairs and an encoder that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = PairNumbers(PLAN)
        self.encoder = PairEncoder(PLAN, self.numbers.inputs, heads=3, width=5)

    def forward(self, batch: Batch, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(batch, pairs, self.numbers(batch, pairs).of_pairs)


def _encoder() -> Both:
    torch.manual_seed(0)
    both, batch = Both(), random_batch(SPEC, seed=9, rows=6)
    torch.nn.init.normal_(both.encoder.bias.weight)  # it starts at 0
    both(batch, target_pairs(batch))
    return both.eval()


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
    summaries = encoder.numbers(batch, target_pairs(batch)).summaries
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
    assert torch.equal(encoder.numbers(poisoned, target_pairs(poisoned)).summaries, summaries)


def test_the_bias_starts_at_zero_so_that_attention_starts_without_it():
    bias, _ = Both()(batch := random_batch(SPEC, seed=3, rows=4), target_pairs(batch))
    assert not bias.any()


def test_distance_of_ids_is_a_number_only_where_ids_have_an_order():
    plain = feature_plan(
        replace(SPEC, item_features=replace(SPEC.item_features, ordered_ids=False))
    )
    batch = random_batch(SPEC, seed=4, rows=4)
    with_distance = PairNumbers(PLAN).raw(batch, target_pairs(batch))
    without = PairNumbers(plain).raw(batch, target_pairs(batch))
    assert with_distance.shape[1] == without.shape[1] + 1
    pairs = target_pairs(batch)
    item, ad = batch.item_id[pairs.query], batch.event_ids["ad"][pairs.event]
    both = (item != -1) & (ad != -1)
    distance = with_distance[:, len(PLAN.pair_numbers)]
    assert torch.equal(distance[both], (item - ad).abs().float()[both])
    assert distance[~both].isnan().all()


def test_summaries_are_those_of_each_targets_events_with_an_item():
    """Against a loop over targets, before the hinges: these come behind the numbers themselves."""
    batch, numbers = random_batch(SPEC, seed=5, rows=30), PairNumbers(PLAN).train()
    pairs = target_pairs(batch)
    numbers(batch, pairs)  # some statistics to standardise by
    numbers.eval()
    plain = numbers.standardise(numbers.raw(batch, pairs))
    found = numbers(batch, pairs).summaries
    count = found.shape[1] // HINGES
    carries = torch.stack([batch.event_ids[n] for n in numbers.carriers]).ne(-1).any(0)[pairs.event]
    lengths = set()
    for t in range(batch.targets):
        mine = (pairs.query == t) & carries
        own, known = plain[mine], batch.pair_numbers[mine].nan_to_num()
        lengths.add(min(len(own), 4))
        if len(own):
            parts = [own[-1], own[-3:].amax(0), own.amax(0), own.amin(0), own.mean(0)]
        else:
            parts = [torch.zeros(plain.shape[1])] * 5
        wanted = torch.cat([*parts, numbers.sums(known.sum(0)[None])[0]])
        torch.testing.assert_close(found[t, :count], wanted)
    assert lengths >= {0, 1, 4} and not carries.all()
