"""Histories that something was taken from: what is left is what it says, and no more is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.histories import histories, shuffled, stale, unseen
from models.batch import Batch
from models.features import feature_plan
from models.history import target_pairs
from models.sequence import Sequence, served_prefix
from models.sequence_config import SequenceConfig
from tests.batches import random_batch
from tests.synthetic import dataset

SPEC = dataset()
PLAN = feature_plan(SPEC)


def _batch(seed: int) -> Batch:
    batch = random_batch(SPEC, seed=seed, rows=8)
    return replace(batch, pair_numbers=batch.pair_numbers.nan_to_num())  # NaN equals nothing


def _seen(batch) -> list[list[tuple]]:
    """Per target: the visible events with the numbers of their pairs, in order."""
    pairs = target_pairs(batch)
    found: list[list[tuple]] = [[] for _ in range(batch.targets)]
    for pair, (t, n) in enumerate(zip(pairs.query.tolist(), pairs.event.tolist(), strict=True)):
        ids = tuple(v[n].item() for v in batch.event_ids.values())
        numbers = tuple(batch.pair_numbers[pair].tolist())
        found[t].append((batch.event_stream[n].item(), ids, numbers))
    return found


def test_a_stale_history_ends_where_the_night_before_stopped_reading():
    batch = _batch(1)
    cut = stale(batch, PLAN)
    before, after = _seen(batch), _seen(cut)
    end, _ = served_prefix(batch, PLAN)
    for t in range(batch.targets):
        kept = min(len(before[t]), int(end[batch.row_of_target[t]]))
        assert after[t] == before[t][:kept]
    assert cut.history_end.sum() < batch.history_end.sum()


def test_a_shuffled_history_has_the_same_events_for_everybody_at_the_same_times():
    batch = _batch(2)
    mixed = shuffled(batch, PLAN)
    before, after = _seen(batch), _seen(mixed)
    assert [sorted(map(repr, x)) for x in after] == [sorted(map(repr, x)) for x in before]
    assert after != before
    assert torch.equal(mixed.event_time, batch.event_time)
    assert torch.equal(mixed.history_end, batch.history_end)
    assert torch.equal(shuffled(batch, PLAN).pair_numbers, mixed.pair_numbers)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("stream", range(len(SPEC.streams)))
def test_a_stream_is_shortened_as_its_spec_would(stream, n):
    batch = _batch(4)
    cut = histories(f"{SPEC.streams[stream].name}={n}", PLAN)(batch, PLAN)
    before, after = _seen(batch), _seen(cut)
    first = {int(r): t for t, r in reversed(list(enumerate(batch.row_of_target)))}
    for t in range(batch.targets):
        base = len(before[first[int(batch.row_of_target[t])]])
        of_stream = [i for i, event in enumerate(before[t]) if event[0] == stream]
        old = [i for i in of_stream if i < base]
        gone = set(of_stream if n == 0 else old[: len(old) - n])
        assert after[t] == [event for i, event in enumerate(before[t]) if i not in gone]
    assert cut.events < batch.events and cut.event_offsets[-1] == cut.events
    assert int(cut.history_end.sum()) == len(cut.pair_numbers)


def test_an_attribute_is_taken_from_every_event():
    batch = _batch(5)
    for name in [c.name for c in PLAN.event_ids]:
        found = histories(f"without={name}", PLAN)(batch, PLAN)
        assert (found.event_ids[name] == -1).all() and (batch.event_ids[name] != -1).any()
        assert {k for k in batch.event_ids if found.event_ids[k] is batch.event_ids[k]} == (
            batch.event_ids.keys() - {name}
        )
    for name in PLAN.event_numbers:
        assert histories(f"without={name}", PLAN)(batch, PLAN).event_floats[name].isnan().all()
    for name, _ in PLAN.event_vectors:
        assert not histories(f"without={name}", PLAN)(batch, PLAN).event_floats[name].any()
    assert histories("queries=2", PLAN) is None


def test_an_unseen_history_says_nothing():
    torch.manual_seed(3)
    model = Sequence(PLAN, SequenceConfig()).eval()
    batch = _batch(3)
    others = replace(
        batch,
        event_time=batch.event_time - 1_000_000,
        event_ids={k: v.flip(0) for k, v in batch.event_ids.items()},
    )
    logits = [model(unseen(b, PLAN)).logits for b in (batch, others)]
    assert torch.equal(*logits)
    assert not torch.allclose(model(batch).logits, logits[0])
    assert _seen(unseen(batch, PLAN)) == [[] for _ in range(batch.targets)]
