"""What is measured of serving is one downstream model in several ways, and counted as it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import serving
from benchmarks.serving import PUBLISHED, SOURCE, Cost, Peer, Request
from models.batch import Sparse
from models.downstream import Downstream, DownstreamConfig, PublishedSource
from models.features import feature_plan
from models.tables import TableConfig
from models.upstream.sequence import Sequence, SequenceConfig
from models.upstream.sum import Sum, SumConfig
from tests.embedded import reads_embeddings
from tests.synthetic import dataset

SPEC = dataset()
PLAN = feature_plan(SPEC)
TABLES = TableConfig(dim=8, default_rows=64, item_rows=64)
K, D = 2, 8


@pytest.fixture(scope="module")
def models() -> tuple[Downstream, Sum, Sequence]:
    torch.manual_seed(0)
    source = PublishedSource(name=SOURCE, embeddings=K, dim=D)
    config = DownstreamConfig(use_user_features=False, sources=(source,), tables=TABLES)
    return (
        reads_embeddings(Downstream(PLAN, {"read": config})).eval(),
        Sum(PLAN, SumConfig(tables=TABLES)).eval(),
        Sequence(PLAN, SequenceConfig(tables=TABLES)).eval(),
    )


@pytest.fixture(scope="module")
def ways(models) -> dict[str, Peer]:
    downstream, tower, pooling = models
    store = torch.randn(serving.USERS, K, D).half()
    return {
        "read": serving.reading("small", downstream, store),
        "sum": serving.carrying_sum("small", downstream, tower),
        "events": serving.carrying_events("small", downstream, pooling),
    }


def asked(candidates: int = 3, seed: int = 0) -> Request:
    return serving.request(SPEC, candidates=candidates, seed=seed)


@pytest.mark.parametrize("way", ["sum", "events"])
def test_every_way_is_the_same_downstream_model(ways, way: str) -> None:
    request = asked(candidates=5)
    store = torch.zeros(serving.USERS, K, D).half()
    store[request.user] = ways[way].user_part(request)[0]
    published = serving.reading("small", ways[way].downstream, store)
    torch.testing.assert_close(ways[way](request), published(request), atol=2e-3, rtol=0)
    assert ways[way](request).shape == (5,)
    assert not torch.allclose(published(request), ways["read"](request), atol=1e-2)


def poisoned(request: Request, *names: str) -> Request:
    """`request` with other values in these fields of its batch."""

    def other(value):
        if isinstance(value, Tensor):
            return value * 2
        if isinstance(value, dict):
            return {k: other(v) for k, v in value.items()}
        return Sparse(value.values * 2, value.offsets, value.scores)

    return replace(
        request,
        batch=replace(request.batch, **{n: other(getattr(request.batch, n)) for n in names}),
    )


FEATURES = ("has_aggregates", "user_ids", "sparse", "dense")
EVENTS = ("event_time", "event_ids", "event_floats")


def test_a_user_part_reads_its_inputs_and_nothing_else_of_the_user(ways) -> None:
    request = asked()
    candidates = ("item_id", "context_ids", "context_floats", "item_features")
    for way, mine, others in (
        ("sum", FEATURES, (*EVENTS, *candidates)),
        ("events", EVENTS, (*FEATURES, "event_available", *candidates)),
        ("read", (), (*FEATURES, *EVENTS, *candidates)),
    ):
        clean = ways[way].user_part(request)
        assert torch.equal(ways[way].user_part(poisoned(request, *others)), clean)
        for name in mine:
            assert not torch.equal(ways[way].user_part(poisoned(request, name)), clean)


def test_the_history_has_its_events_all_before_now() -> None:
    batch = asked().batch
    assert batch.events == serving.EVENTS and (batch.history_end == serving.EVENTS).all()
    assert (batch.event_available.diff() >= 0).all()
    assert (batch.event_available < batch.as_of[0]).all()


@pytest.mark.parametrize("way", ["sum", "events"])
def test_the_carried_part_runs_once_a_request(ways, way: str) -> None:
    extra = {
        n: serving.flops(ways[way], asked(n)) - serving.flops(ways["read"], asked(n))
        for n in (1, 7)
    }
    assert extra[1] == extra[7] > 0
    reading = {n: serving.flops(ways["read"], asked(n)) for n in (1, 2, 3)}
    assert reading[2] - reading[1] == reading[3] - reading[2] > 0


def test_flops_are_two_for_each_multiplication_and_addition() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, request: Tensor) -> Tensor:
            return self.inner(request)

    assert serving.flops(Linear(), torch.zeros(5, 4)) == 2 * 5 * 4 * 3


def test_inputs_are_what_is_stored_of_the_user(ways) -> None:
    request = asked()
    sizes = {way: serving.nbytes(peer.inputs(request)) for way, peer in ways.items()}
    assert sizes["read"] == K * D * 2
    ids = 8 * len(PLAN.user_ids)
    lists = sum(16 + (8 + 4 * s.scored) * (s.max_ids // 2) for s in SPEC.sparse_features)
    assert sizes["sum"] == 4 + ids + lists + 4 * len(PLAN.user_numbers)
    floats = len(PLAN.event_numbers) + sum(dim for _, dim in PLAN.event_vectors)
    assert sizes["events"] == serving.EVENTS * (16 + 8 * len(PLAN.event_ids) + 4 * floats)


def test_peers_take_turns_on_the_same_requests_and_the_first_round_is_not_timed() -> None:
    seen: list[tuple[str, str]] = []
    found = [lambda r, name=name: seen.append((name, r)) for name in ("a", "b")]
    taken = serving.latencies(found, ["x", "y"], 3)
    rounds = [[("a", r), ("b", r)] for r in ("x", "y", "x", "y", "x")]
    assert seen == [call for both in rounds for call in both]
    assert [len(t) for t in taken] == [3, 3] and (np.stack(taken) > 0).all()


def test_a_ratio_is_to_the_published_of_the_same_shape_and_candidates() -> None:
    def cost(peer: str, candidates: int, flops: int, ms: float) -> Cost:
        return Cost(
            peer=peer, shape="small", candidates=candidates, flops=flops, input_bytes=128,
            median_ms=ms,
        )  # fmt: skip

    text = serving.markdown(
        [cost(PUBLISHED, 1, 1000, 1.0), cost("tower", 1, 3000, 2.5),
         cost(PUBLISHED, 50, 50_000, 2.0), cost("tower", 50, 52_000, 3.0)]
    )  # fmt: skip
    one, tower_one, fifty, tower_fifty = (line.split(" | ") for line in text.splitlines()[2:])
    assert tower_one[3:5] == ["3.0", "3.000"] and tower_one[6:] == ["2.500", "2.500 |"]
    assert tower_fifty[3:5] == ["1.0", "1.040"] and tower_fifty[6:] == ["3.000", "1.500 |"]
    assert one[4] == "" == fifty[4] and fifty[3] == "1.0"


def test_a_run_measures_every_way_of_every_shape() -> None:
    found = serving.peers(SPEC)
    costs = serving.measure(SPEC, found, candidates=(1, 4), distinct=2, requests=3)
    three = ["published embedding", "SUM's user tower", "pooling of 64 events"]
    ways = [*(("small", name) for name in three), *(("paper", name) for name in three[:2])]
    assert [(c.shape, c.peer) for c in costs] == [*ways, *ways]
    assert [c.candidates for c in costs] == [1] * 5 + [4] * 5
    lines = serving.markdown(costs).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| small"] * 6 + ["| paper"] * 4
    read, tower, pooled, *_ = costs
    assert read.flops < tower.flops and read.flops < pooled.flops
