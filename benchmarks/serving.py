"""What a downstream model saves by reading a published user embedding instead of computing it.

    python -m benchmarks.serving

One downstream model (`models.downstream`: context and item, no user feature) scores a request, some
candidates of one user, in three ways: it reads the user's published embedding from a table in float16;
it carries SUM's user tower, which reads the user's nightly features; it carries the event sequence
model's pooling of the user's 64 events. The carried part runs once a request, not once a candidate.
SUM comes in our small shape and in the paper's. Weights and inputs are random, shaped by Globo's
spec; every way gets the same requests in turn, in one run, on one CPU thread.

FLOPs are torch's count: of matrix products; table lookups have none. Inputs are what of the user a
request has to bring. Latencies are of eager PyTorch with tables that are built for training, whose own
overhead they mostly are where candidates are few. Not measured: bringing the inputs over a network, and
the nightly pass that publishes, whose FLOPs per user are the carried part's, once a day.

Beside it, from Meta's text on SUM: a 15.3 % increase of serving capacity avoided, against putting the
same complexity into every downstream model. That is of their serving as a whole and their downstream
models, a ratio of 1.153; ours are ratios of this small model alone, and no estimate of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flags import parser
from benchmarks.timing import in_turns
from feature_store import datasets
from feature_store.days import DAY_US, HOUR_US
from feature_store.spec import Dataset, Kind
from jobs.training.downstream import shape_of
from jobs.training.presets import downstream_training, preset
from models.batch import Batch, Sparse
from models.downstream import Downstream, Published, PublishedSource
from models.features import feature_plan
from models.upstream.sequence import Sequence as EventSequence
from models.upstream.sum import Sum, SumConfig

CANDIDATES = (1, 50, 500)
EVENTS = 64
USERS = 200_000  # who have a published embedding
IDS = 100_000  # of items; other vocabularies are smaller and collide
DISTINCT, REQUESTS = 64, 1000
SOURCE = "user"
SHAPES = ("small", "paper")  # of SUM
PUBLISHED = "published embedding"
NOW_US = 17_450 * DAY_US


@dataclass(frozen=True, kw_only=True)
class Request:
    """Candidates of one user: a batch of one row with everything known of the user, and the user's
    place among the published."""

    batch: Batch
    user: int


def request(dataset: Dataset, *, candidates: int, seed: int) -> Request:
    """A random request. Sparse features are half as long as they may be."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, IDS, count))

    def numbers(*shape: int) -> Tensor:
        return torch.from_numpy(rng.gamma(1.0, 10.0, shape).astype(np.float32))

    plan = feature_plan(dataset)
    sparse = {}
    for feature in dataset.sparse_features:
        length = max(feature.max_ids // 2, 1)
        scores = numbers(length) if feature.scored else None
        sparse[feature.name] = Sparse(ids(length), torch.tensor([0, length]), scores)
    available = NOW_US - torch.from_numpy(
        np.sort(rng.integers(HOUR_US, 7 * DAY_US, EVENTS))[::-1].copy()
    )
    none = torch.zeros(candidates, dtype=torch.int64)
    context = dataset.context_features
    batch = Batch(
        user_id=ids(1),
        row_of_target=none,
        target_offsets=torch.tensor([0, candidates]),
        event_offsets=torch.tensor([0, EVENTS]),
        event_stream=torch.from_numpy(rng.integers(0, len(dataset.streams), EVENTS)),
        event_time=available,
        event_available=available,
        event_ids={c.name: ids(EVENTS) for c in plan.event_ids},
        event_floats={n: numbers(EVENTS) for n in plan.event_numbers}
        | {n: numbers(EVENTS, dim) for n, dim in plan.event_vectors},
        history_end=none + EVENTS,
        target_kind=none,
        time=none + NOW_US,
        as_of=none + NOW_US,
        item_id=ids(candidates),
        context_ids={c.name: ids(candidates) for c in context if c.kind is Kind.CATEGORICAL},
        context_floats={c.name: numbers(candidates) for c in context if c.kind is Kind.NUMERIC},
        item_features=numbers(candidates, len(plan.item_numbers)),
        pair_numbers=torch.zeros(0, 0),
        has_aggregates=torch.ones(1),
        user_ids={c.name: ids(1) for c in plan.user_ids},
        sparse=sparse,
        dense=numbers(1, len(plan.user_numbers)),
        labels=torch.full((candidates, len(plan.tasks)), -1, dtype=torch.int32),
    )
    return Request(batch=batch, user=int(rng.integers(0, USERS)))


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The downstream model, with the user's embeddings from `user_part`.

    Args:
        name, shape: for people.
        downstream: reads one source.
        user_part: request -> (1, K, D) float32.
        inputs: request -> what of the user `user_part` reads, as stored.
    """

    name: str
    shape: str
    downstream: Downstream
    user_part: Callable[[Request], Tensor]
    inputs: Callable[[Request], Any]

    def __call__(self, asked: Request) -> Tensor:
        """Logits (candidates,)."""
        values = self.user_part(asked)
        there = torch.ones(1, dtype=torch.bool)
        return self.downstream(asked.batch, {SOURCE: Published(values, there)}).squeeze(1)


def peers(dataset: Dataset) -> list[Peer]:
    """Every way of every shape; the published one of a shape is its first."""
    plan, found = feature_plan(dataset), []
    configs = {"small": SumConfig(), "paper": preset(dataset, "sum_paper").shape}
    for shape in SHAPES:
        tower = Sum(plan, configs[shape]).eval()
        count, dim = tower.config.embeddings, tower.config.dim
        read = [PublishedSource(name=SOURCE, embeddings=count, dim=dim)]
        of_reader = shape_of(downstream_training(dataset), read, user_features=False)
        downstream = Downstream(plan, {PUBLISHED: of_reader}).eval()
        found += [reading(shape, downstream, torch.randn(USERS, count, dim).half())]
        found += [carrying_sum(shape, downstream, tower)]
        pooling = preset(dataset, "sequence").build(dataset, torch.device("cpu")).eval()
        if (pooling.config.embeddings, pooling.config.dim) == (count, dim):
            found += [carrying_events(shape, downstream, pooling)]
    return found


def reading(shape: str, downstream: Downstream, store: Tensor) -> Peer:
    """Reads from `store` (users, K, D) float16."""

    def stored(asked: Request) -> Tensor:
        return store[asked.user : asked.user + 1]

    return Peer(
        name=PUBLISHED, shape=shape, downstream=downstream, inputs=stored,
        user_part=lambda r: stored(r).float(),
    )  # fmt: skip


def carrying_sum(shape: str, downstream: Downstream, tower: Sum) -> Peer:
    """Runs SUM's user tower on the user's nightly features."""

    def features(asked: Request) -> Any:
        batch = asked.batch
        return batch.has_aggregates, batch.user_ids, batch.sparse, batch.dense

    return Peer(
        name="SUM's user tower", shape=shape, downstream=downstream, inputs=features,
        user_part=lambda r: tower.user_embeddings(r.batch),
    )  # fmt: skip


def carrying_events(shape: str, downstream: Downstream, pooling: EventSequence) -> Peer:
    """Runs the event sequence model's pooling of the user's events."""

    def events(asked: Request) -> Any:
        batch = asked.batch
        return batch.event_stream, batch.event_time, batch.event_ids, batch.event_floats

    def embeddings(asked: Request) -> Tensor:
        batch = asked.batch
        return pooling.user_embeddings(batch, batch.as_of[:1])

    return Peer(
        name=f"pooling of {EVENTS} events", shape=shape, downstream=downstream, inputs=events,
        user_part=embeddings,
    )  # fmt: skip


# ---- what is counted


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a request of so many candidates costs.

    Args:
        flops: of the request.
        input_bytes: of the user.
        median_ms: of the requests' latencies.
    """

    peer: str
    shape: str
    candidates: int
    flops: int
    input_bytes: int
    median_ms: float


def nbytes(value: Any) -> int:
    """Of every tensor in `value`, which may be nested."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if value is None:
        return 0
    return sum(map(nbytes, value.values() if isinstance(value, dict) else value))


def flops(peer: Peer, asked: Request) -> int:
    """Of one request."""
    with FlopCounterMode(display=False) as counter:
        peer(asked)
    return counter.get_total_flops()


@torch.no_grad()  # fused tables know no inference mode
def latencies(found: Sequence[Peer], asked: Sequence[Request], requests: int) -> list[np.ndarray]:
    """Milliseconds of each peer's requests, after as many that are not counted as there are distinct
    ones."""

    def serve(peer: Peer, queue: Iterator[Request]) -> None:
        peer(next(queue))

    served = {str(i): partial(serve, peer, cycle(asked)) for i, peer in enumerate(found)}
    taken = in_turns(served, rounds=requests, warm_up=len(asked))
    return [1e3 * seconds for seconds in taken.values()]


def measure(
    dataset: Dataset, found: Sequence[Peer], *, candidates: Sequence[int] = CANDIDATES,
    distinct: int = DISTINCT, requests: int = REQUESTS,
) -> list[Cost]:  # fmt: skip
    """The cost of each peer and number of candidates."""
    out = []
    for count in candidates:
        asked = [request(dataset, candidates=count, seed=seed) for seed in range(distinct)]
        timed = latencies(found, asked, requests)
        out += [
            Cost(
                peer=peer.name, shape=peer.shape, candidates=count,
                flops=flops(peer, asked[0]),
                input_bytes=nbytes(peer.inputs(asked[0])),
                median_ms=float(np.median(taken)),
            )
            for peer, taken in zip(found, timed, strict=True)
        ]  # fmt: skip
    return out


def markdown(costs: Sequence[Cost]) -> str:
    """A table; ratios are to the published embedding of the same shape and candidates."""
    out = [
        "| shape | user part | candidates | kFLOP an impression | ratio | user inputs, bytes "
        "| median, ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    published = {(c.shape, c.candidates): c for c in costs if c.peer == PUBLISHED}
    for c in sorted(costs, key=lambda c: (SHAPES.index(c.shape), c.candidates)):
        base = published[c.shape, c.candidates]

        def ratio(mine: float, theirs: float, c: Cost = c) -> str:
            return "" if c.peer == PUBLISHED else f"{mine / theirs:.3f}"

        out.append(
            f"| {c.shape} | {c.peer} | {c.candidates} | {c.flops / c.candidates / 1e3:,.1f} | "
            f"{ratio(c.flops, base.flops)} | {c.input_bytes:,} | {c.median_ms:.3f} | "
            f"{ratio(c.median_ms, base.median_ms)} |"
        )
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser("serving", __doc__).parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = datasets.get("globo")
    print(
        f"random inputs and weights; {REQUESTS} requests of each, {DISTINCT} of them distinct; one "
        "thread; ratios to reading the published embedding (Meta's text: 15.3 % avoided, 1.153)\n"
    )
    print(markdown(measure(dataset, peers(dataset))))


if __name__ == "__main__":
    main()
