"""Whose embeddings help where: user models of one domain, and of all, read in each domain.

    python -m benchmarks.domains --dataset simulated --out DIR [--seeds 0,1]

A SUM is trained on the targets of one domain (a surface, a device) or of all, day by day; its
embeddings of the day before, pooled over three days as they are published, go to a downstream model
of context and item in each domain, which is trained and evaluated on that domain's targets only. A
row is the upstream model, a column the domain, a cell the NE less that of context and item alone, with
the 95 % interval of a paired bootstrap over users; means over seeds and over the newest test days.
Reads the lake in HEADWATER_HOME; everything is kept under --out, and a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.alone import (
    ALL_TASKS,
    Program,
    decode,
    fit,
    label_counts,
    rounds,
    with_embeddings,
)
from benchmarks.flags import flags
from benchmarks.progressive import Progressive, published
from benchmarks.results import (
    Predictions,
    Result,
    difference,
    interval_text,
    joined,
    mean_ne,
    of_scored,
)
from feature_store import datasets
from feature_store.days import shift
from feature_store.embeddings import EmbeddingKind
from feature_store.errors import HeadwaterError, SpecError
from feature_store.spec import Dataset
from feature_store.tables import NO_LABEL
from jobs.settings import Settings
from jobs.training.downstream import Loaded
from jobs.training.loop import domain_id
from jobs.training.presets import preset
from jobs.training.rows import Rows
from models.metrics import Interval

ALL = "sum"
OF_ONE_DOMAIN = {
    "simulated": ("sum_surface_0", "sum_surface_1"),
    "globo": ("sum_device_1", "sum_device_3"),
}
CONTEXT = "context"


def domains(dataset: Dataset) -> dict[str, int]:
    """The preset of each domain, and the domain's id as batches hold it.

    Raises:
        SpecError: the dataset has no such presets.
    """
    if dataset.name not in OF_ONE_DOMAIN:
        raise SpecError(
            f"--dataset: {dataset.name!r} has no models of one domain, {', '.join(OF_ONE_DOMAIN)} have; "
            "add them to jobs/training/presets.py and here"
        )
    values = {m: preset(dataset, m).training.domain for m in OF_ONE_DOMAIN[dataset.name]}
    return {m: domain_id(dataset, value) for m, value in values.items() if value is not None}


def of_domain(decoded: Sequence[Rows], dataset: Dataset, domain: int) -> list[Rows]:
    """The rows with the targets of one domain only."""
    return [
        replace(
            rows,
            labels=np.where(
                (rows.targets[f"ids/{dataset.domain}"] == domain)[:, None], rows.labels, NO_LABEL
            ),
        ).asked()
        for rows in decoded
    ]


def measure(
    progressive: Progressive, *, seed: int, embeddings: bool
) -> tuple[Predictions, dict[str, Any]]:
    """Train upstream, and downstream in each domain.

    Args:
        embeddings: whether the downstream model reads any; if not, nothing is trained upstream.

    Returns:
        Predictions, a part for each domain; and facts: base_rates by domain and task, seconds.
    """
    began = time.monotonic()
    dataset, lake = progressive.dataset, progressive.lake
    days = progressive.run() if embeddings else {}
    found: list[Predictions] = []
    counts: dict[str, dict[str, np.ndarray]] = {}

    def batches(rows: Sequence[Rows], ds: str) -> list[Loaded]:
        before = published(days, shift(ds, -1), EmbeddingKind.POOLED) if embeddings else None
        return with_embeddings(dataset, rows, before)

    for task in dataset.tasks:
        for each in rounds(lake, dataset, task, progressive.days):
            rows = decode(lake, dataset, task, each)
            for domain in domains(dataset).values():
                mine = {ds: of_domain(of, dataset, domain) for ds, of in rows.training.items()}
                seen = label_counts(dataset, task, mine)
                if not 0 < seen[0] < seen[1]:  # the task is not asked in this domain
                    continue
                of_part = counts.setdefault(str(domain), {})
                of_part[task.name] = of_part.get(task.name, 0) + seen
                training = [item for ds, of in mine.items() for item in batches(of, ds)]
                predict = fit(dataset, task, training, seed=seed)
                test = of_domain(rows.test, dataset, domain)
                found.append(of_scored(dataset, str(domain), predict(batches(test, each.test))))
    rates = {
        domain: {task: float(seen[0] / seen[1]) for task, seen in of.items()}
        for domain, of in counts.items()
    }
    return joined(found), {"base_rates": rates, "seconds": time.monotonic() - began}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One upstream model read in one domain, for one task or the mean over them; means over seeds.

    Args:
        ne: of the downstream model.
        to_context: that less the NE of context and item alone.
    """

    task: str
    model: str
    domain: str
    seeds: int
    ne: float
    to_context: Interval


def cells(results: Sequence[Result]) -> list[Cell]:
    """By task, the mean over the tasks first; then by upstream model; then by domain."""
    models: dict[str, list[Result]] = {}
    for result in results:
        models.setdefault(result.model, []).append(result)
    rates = results[0].facts["base_rates"]
    found = []
    for task in (ALL_TASKS, *dict.fromkeys(t for of in rates.values() for t in of)):
        for model, of in models.items():
            for domain, known in rates.items():
                chosen = known if task == ALL_TASKS else {t: known[t] for t in known if t == task}
                if chosen:
                    found.append(
                        Cell(
                            task=task, model=model, domain=domain, seeds=len(of),
                            ne=mean_ne(of, domain, chosen),
                            to_context=difference(of, domain, models[CONTEXT], domain, chosen),
                        )
                    )  # fmt: skip
    return found


def markdown(found: Sequence[Cell], dataset: Dataset) -> str:
    """A matrix for each task: context's row holds its NE, the others' the difference to it."""
    columns = list(dict.fromkeys(cell.domain for cell in found))
    out = [f"Seeds: {found[0].seeds}. Intervals are over users, not over trainings."]
    for task in dict.fromkeys(cell.task for cell in found):
        out += [
            f"\n### {task}\n",
            f"| upstream | {' | '.join(f'{dataset.domain} {c}' for c in columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for model in dict.fromkeys(cell.model for cell in found):
            of = {c.domain: c for c in found if (c.task, c.model) == (task, model)}
            texts = {
                name: f"NE {c.ne:.4f}" if model == CONTEXT else interval_text(c.to_context)
                for name, c in of.items()
            }
            out.append(f"| {model} | {' | '.join(texts.get(c, '') for c in columns)} |")
    return "\n".join(out) + "\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    return flags("domains", __doc__).parse_args(argv)


def run(program: Program) -> list[Result]:
    """Every upstream model, none first, and every seed: what is done, is read."""
    found = program.results(CONTEXT, ALL, partial(measure, embeddings=False))
    for model in (ALL, *domains(program.dataset)):
        found += program.results(model, model, partial(measure, embeddings=True))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the matrices; they are kept as `table.md` and `table.json` too."""
    args = arguments(argv)
    try:
        dataset = datasets.get(args.dataset)
        program = Program("domains", Settings.from_env(), dataset, args)
        found = cells(run(program))
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    program.store.write_table(markdown(found, dataset), [asdict(x) for x in found])


if __name__ == "__main__":
    main()
