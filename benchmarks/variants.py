"""What variants of an upstream model bring downstream, beside what they are worth themselves.

    python -m benchmarks.variants --dataset simulated|globo --out DIR \\
        --models sum,sum:mix.sizes=12+6,sum:embeddings=4 [--seeds 0,1]

Names are as in `benchmarks/ours.py`, without histories. Each is trained day by day; its embeddings of the
day before, raw or pooled as the dataset's downstream models read them, go to one of context and item,
trained on some days and evaluated on the day after them; beside them the same model without any
embeddings, with the hand-made aggregates in their place, and with both. What decides a default: the NE
of the upstream model, in progressive validation, and that of the downstream model, which is what
embeddings are for; arxiv 2311.09544 finds that a larger mix tower helps the first and not the second.
Means over seeds and over the newest test days; paired bootstrap over users. Reads the lake in HEADWATER_HOME;
everything is kept under --out, and a run that was killed goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.alone import AGGREGATES, ALL_TASKS, CONTEXT, Program, report
from benchmarks.flags import flags, listed
from benchmarks.progressive import publishable
from benchmarks.results import Result, by_model, difference, interval_text, mean_ne
from feature_store.errors import SpecError
from models.metrics import Interval

_PART = "test"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One variant and one task, or the mean over the tasks; means over the seeds.

    Args:
        model: its name, or `context`, the downstream model without any embeddings, or `aggregates`.
        upstream_ne: of the variant itself, on the same days; None of the last two.
        ne: of the downstream model.
        recovered: the gain over `context`, as a share of what `aggregates` gain; NaN where that is none.
        to_context, to_first: that less the NE of `context`, and of the first variant.
        beside: NE of what reads it beside the hand-made aggregates, less that of those alone; None of the
            last two.
    """

    task: str
    model: str
    seeds: int
    upstream_ne: float | None
    ne: float
    recovered: float
    to_context: Interval
    to_first: Interval
    beside: Interval | None


def lines(results: Sequence[Result]) -> list[Line]:
    """By task, the mean over the tasks first; `context`, the variants in their order, `aggregates`."""
    models = by_model(results)
    both = {name: models.pop(_beside(name)) for name in [*models] if _beside(name) in models}
    _, first, *_ = models
    rates = results[0].facts["base_rates"][_PART]
    tasks = {ALL_TASKS: rates, **{name: {name: rate} for name, rate in rates.items()}}
    found = []
    for task, chosen in tasks.items():
        context = mean_ne(models[CONTEXT], _PART, chosen)
        yardstick = context - mean_ne(models[AGGREGATES], _PART, chosen)
        for model, of in models.items():
            ne = mean_ne(of, _PART, chosen)
            judged = [r.facts["upstream_ne"] for r in of]
            upstream = [by_task[t] for by_task in judged for t in chosen if t in by_task]
            found.append(
                Line(
                    task=task, model=model, seeds=len(of),
                    upstream_ne=float(np.mean(upstream)) if upstream else None,
                    ne=ne,
                    recovered=(context - ne) / yardstick if yardstick else float("nan"),
                    to_context=difference(of, _PART, models[CONTEXT], _PART, chosen),
                    to_first=difference(of, _PART, models[first], _PART, chosen),
                    beside=difference(both[model], _PART, models[AGGREGATES], _PART, chosen)
                    if model in both
                    else None,
                )
            )  # fmt: skip
    return found


def markdown(found: Sequence[Line]) -> str:
    """A table per task."""
    first = found[1].model
    out = [f"Seeds: {found[0].seeds}. Intervals are over users, not over trainings."]
    for task in dict.fromkeys(line.task for line in found):
        out += [
            f"\n### {task}\n",
            f"| upstream | its NE | NE downstream | less {CONTEXT}, 95 % | recovered | less {first}, 95 % | "
            f"adds to {AGGREGATES}, 95 % |",
            "|---|---|---|---|---|---|---|",
        ]
        for x in (x for x in found if x.task == task):
            own = "" if x.upstream_ne is None else f"{x.upstream_ne:.4f}"
            to_context = "" if x.model == CONTEXT else interval_text(x.to_context)
            recovered = "-" if np.isnan(x.recovered) else f"{x.recovered:.0%}"
            recovered = "" if x.model == CONTEXT else recovered
            to_first = "" if x.model in (CONTEXT, first) else interval_text(x.to_first)
            beside = "" if x.beside is None else interval_text(x.beside)
            cells = (x.model, own, f"{x.ne:.4f}", to_context, recovered, to_first, beside)
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = flags("variants", __doc__)
    cli.add_argument(
        "--models", type=listed, required=True, help="the one to compare with, then its variants"
    )
    return cli.parse_args(argv)


def run(program: Program) -> list[Result]:
    """No embeddings, every variant, the aggregates, and both, with every seed: what is done, is read.

    Raises:
        SpecError: --models names none, or not a model that can be published; none is trained then.
    """
    names = program.args.models
    if not names:
        raise SpecError("--models is empty: name a model, then its variants")
    for name in names:
        publishable(program.dataset, name)
    parts = {_PART: list}
    found = program.beside_context(names, parts)
    found += program.measured(AGGREGATES, names[0], parts, embeddings=False, user_features=True)
    for name in names:
        found += program.measured(_beside(name), name, parts, embeddings=True, user_features=True)
    return found


def _beside(name: str) -> str:
    return f"{AGGREGATES}+{name}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the tables; they are kept as `table.md` and `table.json` too."""
    report("variants", arguments(argv), lambda program: lines(run(program)), markdown)


if __name__ == "__main__":
    main()
