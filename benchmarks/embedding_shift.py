"""Answers to embedding distribution shift, compared: what a new snapshot costs those who read the old one.

    python -m benchmarks.embedding_shift --dataset simulated --out DIR [--seeds 0,1] [--model sum]

A day's training moves every user's embedding, and a downstream model was trained on the old ones.
The answers: none (raw embeddings), pooling over three days (the default), a term of the loss that
regularises towards the snapshot before, or distils from it; and each of those two pooled. Reads the
lake in HEADWATER_HOME; everything is kept under --out, and a run that was killed goes on.

The upstream model is trained day by day. A downstream model of context, item and these embeddings
alone is trained on targets of the days up to D, each with the embeddings of the day before it, and
evaluated on day D + 1

    served   with the embeddings of day D, as a new snapshot gives them
    held     with the features of day D, by the snapshot of D - 1, which training read last

so that served less held is what the new snapshot costs: the features are equally fresh. `training`
is the NE of the last day trained on. Arxiv 2311.09544 says that pooling mends the NE in evaluation
much more than that in training. Means over the tasks and the newest D; paired bootstrap over users.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.alone import (
    ALL_TASKS,
    Program,
    announce,
    decode,
    fit,
    label_counts,
    report,
    rounds,
    with_embeddings,
)
from benchmarks.flags import flags
from benchmarks.progressive import Embedded, Progressive, progressive_ne, published
from benchmarks.results import (
    Predictions,
    Result,
    by_model,
    difference,
    interval_text,
    joined,
    mean_ne,
    of_scored,
)
from feature_store.days import shift
from feature_store.embeddings import EmbeddingKind, UserEmbeddings
from jobs.training.config import Shift
from jobs.training.judge import drift
from models.metrics import Interval

TRAINING, SERVED, HELD = "training", "served", "held"
_DRIFT = ("cosine", "l2_relative")


def answers(model: str) -> list[str]:
    """Presets of `model` with each answer in the loss, the one without first."""
    return [model, *(f"{model}_{shift}" for shift in (Shift.REGULARISE, Shift.DISTIL))]


def part(kind: EmbeddingKind, side: str) -> str:
    """The name of the predictions of one kind of embeddings."""
    return f"{kind} {side}"


def measure(progressive: Progressive, *, seed: int) -> tuple[Predictions, dict[str, Any]]:
    """Train upstream and downstream.

    Returns:
        Predictions in six parts: raw and pooled, each in training, served and held. And facts:
        base_rates and upstream_ne by task; drift by kind of embeddings; seconds.
    """
    began = time.monotonic()
    dataset, days = progressive.dataset, progressive.run()
    found, rates, read = [], {}, set()
    for task in dataset.tasks:
        counts = np.zeros(2, np.int64)
        for each in rounds(progressive.lake, dataset, task, days):
            read.add(each.served)
            rows = decode(progressive.lake, dataset, task, each)
            for kind in EmbeddingKind:
                training = {
                    ds: with_embeddings(dataset, decoded, published(days, shift(ds, -1), kind))
                    for ds, decoded in rows.training.items()
                }
                batches = [item for of_day in training.values() for item in of_day]
                predict = fit(dataset, task, batches, seed=seed)
                sides = {TRAINING: training[each.training[-1]]}
                for side in (SERVED, HELD):
                    embeddings = published(days, each.served, kind, held=side == HELD)
                    sides[side] = with_embeddings(dataset, rows.test, embeddings)
                found += [
                    of_scored(dataset, part(kind, side), predict(test))
                    for side, test in sides.items()
                ]
            counts += label_counts(dataset, task, rows.training)
            announce(task, each)
        rates[task.name] = float(counts[0] / counts[1])
    return joined(found), {
        "base_rates": rates,
        "upstream_ne": progressive_ne(days, [shift(ds, 1) for ds in sorted(read)]),
        "drift": {kind: mean_drift(days, sorted(read), kind) for kind in EmbeddingKind},
        "seconds": time.monotonic() - began,
    }


def mean_drift(
    days: Mapping[str, Embedded], chosen: Sequence[str], kind: EmbeddingKind
) -> dict[str, float]:
    """How far the same users' embeddings move from one day to the next, over the days `chosen`.

    Returns:
        cosine (mean); l2_relative (mean L2 distance over mean L2 norm); and of the same features by
        the two days' snapshots, cosine_same_features, l2_relative_same_features.
    """
    found: dict[str, list[float]] = {}
    for ds in chosen:
        now = published(days, ds, kind)
        moved = between(now, published(days, shift(ds, -1), kind))
        same = between(now, published(days, ds, kind, held=True))
        for name in _DRIFT:
            found.setdefault(name, []).append(moved[name])
            found.setdefault(f"{name}_same_features", []).append(same[name])
    return {name: float(np.mean(values)) for name, values in found.items()}


def between(now: UserEmbeddings, before: UserEmbeddings) -> dict[str, Any]:
    """`drift` of the users that both have."""
    values, present = before.lookup(now.ids)
    return drift(now.values[present], values[present])


@dataclass(frozen=True, kw_only=True)
class Line:
    """One answer and one task, or the mean over the tasks; means over the seeds.

    Args:
        model, kind: which preset, and which of its embeddings.
        ne: by `training`, `served` and `held`.
        cost: NE served less held.
        to_none: NE in `training` and `served` less that of the raw embeddings without any answer.
    """

    task: str
    model: str
    kind: EmbeddingKind
    seeds: int
    ne: dict[str, float]
    cost: Interval
    to_none: dict[str, Interval]
    upstream_ne: float
    drift: dict[str, float]


def lines(results: Sequence[Result]) -> list[Line]:
    """By task, the mean over the tasks first. The first result's model is the one without any answer."""
    models = by_model(results)
    none, rates = models[results[0].model], results[0].facts["base_rates"]
    tasks = {ALL_TASKS: rates, **{name: {name: rate} for name, rate in rates.items()}}
    return [
        _line(name, model, kind, of, none, chosen)
        for name, chosen in tasks.items()
        for model, of in models.items()
        for kind in EmbeddingKind
    ]


def _line(
    task: str,
    model: str,
    kind: EmbeddingKind,
    of: Sequence[Result],
    none: Sequence[Result],
    rates: Mapping[str, float],
) -> Line:
    served = part(kind, SERVED)
    upstream = [r.facts["upstream_ne"][name] for r in of for name in rates]
    drifts = [r.facts["drift"][kind] for r in of]
    return Line(
        task=task,
        model=model,
        kind=kind,
        seeds=len(of),
        ne={side: mean_ne(of, part(kind, side), rates) for side in (TRAINING, SERVED, HELD)},
        cost=difference(of, served, of, part(kind, HELD), rates),
        to_none={
            side: difference(of, part(kind, side), none, part(EmbeddingKind.RAW, side), rates)
            for side in (TRAINING, SERVED)
        },
        upstream_ne=float(np.mean(upstream)),
        drift={name: float(np.mean([d[name] for d in drifts])) for name in drifts[0]},
    )


def markdown(found: Sequence[Line]) -> str:
    """How far the embeddings move, and a table of NE per task."""
    first = [line for line in found if line.task == found[0].task]
    out = [
        f"Seeds: {first[0].seeds}. Intervals are over users, not over trainings.\n",
        "### Embeddings of the same users, from one day to the next\n",
        "| embeddings | cosine | L2 / norm | cosine, same features | L2 / norm, same features | upstream NE |",
        "|---|---|---|---|---|---|",
    ]
    for line in first:
        moved = (line.drift[f"{n}{of}"] for of in ("", "_same_features") for n in _DRIFT)
        numbers = " | ".join(f"{x:.3f}" for x in moved)
        out.append(f"| {line.model} {line.kind} | {numbers} | {line.upstream_ne:.4f} |")
    for task in dict.fromkeys(line.task for line in found):
        out += [
            f"\n### NE downstream: {task}\n",
            "| embeddings | training | evaluation | evaluation, snapshot held | the new snapshot costs, 95 % | "
            "training less none's | evaluation less none's |",
            "|---|---|---|---|---|---|---|",
        ]
        for line in (x for x in found if x.task == task):
            ne = " | ".join(f"{line.ne[side]:.4f}" for side in (TRAINING, SERVED, HELD))
            differences = (line.cost, line.to_none[TRAINING], line.to_none[SERVED])
            cells = " | ".join(interval_text(d) for d in differences)
            out.append(f"| {line.model} {line.kind} | {ne} | {cells} |")
    return "\n".join(out) + "\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = flags("embedding_shift", __doc__)
    cli.add_argument("--model", default="sum", help="preset of the upstream model")
    return cli.parse_args(argv)


def run(program: Program) -> list[Result]:
    """Every answer and seed: what is done, is read."""
    of_models = (program.results(m, m, measure) for m in answers(program.args.model))
    return [result for of_model in of_models for result in of_model]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables; they are kept as `table.md` and `table.json` too."""
    report("embedding_shift", arguments(argv), lambda program: lines(run(program)), markdown)


if __name__ == "__main__":
    main()
