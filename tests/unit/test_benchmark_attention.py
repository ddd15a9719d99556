"""The peers compute what ours does, on the rows that are timed, and are timed in turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import MOST, PEERS, check_agreement, histories, markdown, works
from benchmarks.timing import in_turns

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_rows_of_histories_are_ordered_by_time_and_bounded() -> None:
    events = histories(400, 40, CPU)
    lengths = events.event_offsets.diff()
    assert events.rows == 40
    assert events.events == int(lengths.sum())
    assert lengths.min() >= 1
    assert lengths.max() == MOST  # of 40 with this median one is cut
    within = torch.ones(events.events - 1, dtype=torch.bool)
    within[events.event_offsets[1:-1] - 1] = False
    assert (events.event_time.diff()[within] >= 0).all()


@pytest.mark.parametrize("nth", range(4))
def test_every_peer_computes_the_same_with_the_same_gradients(nth: int) -> None:
    check_agreement(works(histories(9, 7, CPU), CPU, torch.float32)[nth])


def test_a_peer_that_computes_something_else_is_found_out(monkeypatch) -> None:
    work = works(histories(9, 7, CPU), CPU, torch.float32)[2]

    def sees_one_less(mine: attention.Work) -> torch.Tensor:
        return PEERS["rows"](replace(mine, kv_end=(mine.kv_end - 1).clamp(min=1)))

    monkeypatch.setattr(attention, "PEERS", {"other": sees_one_less})
    with pytest.raises(RuntimeError, match="targets: other is apart from ours"):
        check_agreement(work)


def test_each_takes_its_turn_and_the_ratio_is_by_round() -> None:
    order: list[str] = []
    taken = in_turns({name: lambda name=name: order.append(name) for name in ("a", "b")}, rounds=2)
    assert order == ["a", "b"] * 3  # one to warm up
    assert all(len(seconds) == 2 for seconds in taken.values())
    table = markdown(
        {(30, "self"): {"a": taken["a"] * 0 + 0.002, "b": taken["b"] * 0 + 0.005}}, "attention"
    )
    assert "| self, median 30 | 2.00 | 2.50 |" in table
