"""Whose embeddings help where: user models of one domain, and of all, read in each domain.

    python -m benchmarks.domains --dataset simulated --out DIR [--seeds 0,1]

A SUM is trained on the targets of one domain (a surface, a device) or of all, day by day; its
embeddings of the day before, raw or pooled as the dataset's downstream models read them, go to one of
context and item in each domain, which is trained and evaluated on that domain's targets only. A
row is the upstream model, a column the domain, a cell the NE less that of context and item alone, with
the 95 % interval of a paired bootstrap over users; means over seeds and over the newest test days.
Reads the lake in HEADWATER_HOME; everything is kept under --out, and a run that was killed goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks.alone import ALL_TASKS, CONTEXT, Program, report
from benchmarks.flags import flags
from benchmarks.results import Result, by_model, difference, interval_text, mean_ne
from feature_store.errors import SpecError
from feature_store.spec import Dataset
from feature_store.tables import NO_LABEL
from jobs.training.loop import domain_id
from jobs.training.presets import preset
from jobs.training.rows import Rows
from models.metrics import Interval

ALL = "sum"
OF_ONE_DOMAIN = {
    "simulated": ("sum_surface_0", "sum_surface_1"),
    "globo": ("sum_device_1", "sum_device_3"),
}


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


def of_domain(dataset: Dataset, domain: int, decoded: Sequence[Rows]) -> list[Rows]:
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
    models = by_model(results)
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


def markdown(found: Sequence[Cell]) -> str:
    """A matrix for each task: context's row holds its NE, the others' the difference to it."""
    columns = list(dict.fromkeys(cell.domain for cell in found))
    out = [f"Seeds: {found[0].seeds}. Intervals are over users, not over trainings."]
    for task in dict.fromkeys(cell.task for cell in found):
        out += [
            f"\n### {task}\n",
            f"| upstream | {' | '.join(columns)} |",
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
    known = domains(program.dataset)
    name = program.dataset.domain
    parts = {f"{name} {of}": partial(of_domain, program.dataset, of) for of in known.values()}
    return program.beside_context((ALL, *known), parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the matrices; they are kept as `table.md` and `table.json` too."""
    report("domains", arguments(argv), lambda program: cells(run(program)), markdown)


if __name__ == "__main__":
    main()
