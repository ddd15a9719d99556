"""What user signal is worth, and which: the same towers with more and more to read.

    python -m benchmarks.paradigm --dataset simulated|globo --out DIR [--seeds 0,1,2] [--first DAY]

Trained day by day, then frozen; the last day before the test for choosing, the newest two as the test
(`benchmarks/split.py`). Rows: item and context alone; the nightly features of the user, as SUM gives them
to others (K embeddings) and crossed with the candidate in full; events, cut where the nightly features
are, shuffled, and as they are; both. Below them what separates two rows: freshness is what events lose
when they are cut, order what they lose when they are shuffled (`benchmarks/histories.py`), so that the
paradigm is credited with neither. Reads the lake that `make run DATASET=...` built in HEADWATER_HOME;
each training is a file under --out, and a run that was killed goes on when the same is typed again.

NE: mean log loss over the entropy of the base rate of the training days, averaged over seeds. A
difference has a 95 % interval by a paired bootstrap over users, all seeds at once: it says what other users
would have changed, and of other trainings only as much as there are seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from benchmarks.flags import check_names, flags, listed
from benchmarks.ours import Ours
from benchmarks.results import (
    Result,
    Store,
    difference,
    interval_text,
    mean_ne,
)
from benchmarks.split import Split, base_rates, newest_split, pins
from feature_store import datasets
from feature_store.errors import HeadwaterError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.settings import Settings
from models.metrics import Interval

ROWS = {
    "sequence:unseen": "item and context",
    "sum": "+ nightly features, through SUM's embeddings",
    "hybrid:unseen": "+ nightly features",
    "sequence:stale": "+ events until the night before",
    "sequence:shuffled": "+ events up to the moment, shuffled",
    "sequence": "+ events up to the moment",
    "hybrid": "+ events up to the moment and nightly features",
}
QUESTIONS = (
    ("user signal, all of it", "hybrid", "sequence:unseen"),
    ("events over nightly features, both of the night before", "sequence:stale", "hybrid:unseen"),
    ("freshness: events of today", "sequence", "sequence:stale"),
    ("order of the events", "sequence", "sequence:shuffled"),
    ("events beside nightly features", "hybrid", "hybrid:unseen"),
    ("nightly features beside events", "hybrid", "sequence"),
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = flags("paradigm", __doc__)
    cli.add_argument("--first", help="day to train from; default: the first of the lake")
    cli.add_argument(
        "--change", type=listed, default=[], metavar="FIELD=VALUE",
        help="of all models with histories, as in `ours.py`: members=1",
    )  # fmt: skip
    cli.add_argument("--models", type=listed, default=list(ROWS), help="rows; default: all")
    return cli.parse_args(argv)


class Paradigm:
    """Every row and seed that was asked for.

    Args:
        lake, dataset: of the rows.
        args: of the command line.
        split: of the days; default: the newest that the lake has.

    Raises:
        SpecError: --models or --change names nothing that there is.
        DataError: the lake has too few days.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, args: argparse.Namespace, split: Split | None = None
    ) -> None:
        check_names("--models", args.models, ROWS)
        self.split = split or newest_split(lake, dataset, first=args.first)
        self.lake, self.dataset, self.args = lake, dataset, args
        self.store = Store(args.out / "paradigm" / dataset.name)
        tasks = [task.name for task in dataset.tasks]
        self.base_rates = base_rates(lake, dataset, self.split.days("train"), tasks)

    def run(self) -> dict[str, list[Result]]:
        """By row: what is done, is read."""
        about = {"spec": self.dataset.hash, "split": asdict(self.split), "pins": pins(self.lake)}
        tasks = list(self.base_rates)
        found: dict[str, list[Result]] = {row: [] for row in self.args.models}
        for seed in map(int, self.args.seeds):
            for row in found:
                changes = [] if row == "sum" else self.args.change
                name = ":".join([row, *changes])
                model = Ours(self.lake, self.dataset, name, self.split, share=1.0)
                config = {"data": about, "model": model.config()}
                train = partial(model.run, tasks, seed)
                found[row].append(self.store.once(name, tasks, seed, config, train))
        return found


def answers(
    results: Mapping[str, Sequence[Result]], rates: Mapping[str, float]
) -> dict[str, dict[str, Interval]]:
    """Question -> task -> NE on the test of the first row less that of the second; of questions whose
    rows are both there."""
    return {
        text: {
            task: difference(results[one], "test", results[other], "test", {task: rate})
            for task, rate in rates.items()
        }
        for text, one, other in QUESTIONS
        if one in results and other in results
    }


def markdown(
    results: Mapping[str, Sequence[Result]],
    differences: Mapping[str, Mapping[str, Interval]],
    rates: Mapping[str, float],
    dataset: Dataset,
) -> str:
    """NE of each row on validation and test, and what separates them."""
    titles = [f"`{t.name}`{' (sampled)' if t.sampled else ''}" for t in dataset.tasks]
    out = []
    for part in ("validation", "test"):
        out += [
            f"\n| NE on the {part} | {' | '.join(titles)} |",
            f"|---|{'---|' * len(titles)}",
        ]
        for row, of in results.items():
            cells = [f"{mean_ne(of, part, {task: rate}):.4f}" for task, rate in rates.items()]
            out.append(f"| {ROWS[row]} | {' | '.join(cells)} |")
    out += [f"\n| test, difference | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for text, by_task in differences.items():
        cells = [interval_text(by_task[task]) for task in rates]
        out.append(f"| {text} | {' | '.join(cells)} |")
    seeds = {r.seed for of in results.values() for r in of}
    made_up = "; simulated data" if dataset.simulated else ""
    return "\n".join(out).lstrip() + f"\n\n{len(seeds)} seed(s){made_up}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing and print the table; it is kept as `table.md` and `table.json` too."""
    args = arguments(argv)
    try:
        dataset = datasets.get(args.dataset)
        paradigm = Paradigm(Lake(Settings.from_env().lake_root, dataset), dataset, args)
        results = paradigm.run()
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    rates = paradigm.base_rates
    differences = answers(results, rates)
    values = {
        "base_rates": rates,
        "ne": {
            row: {t: mean_ne(of, "test", {t: rate}) for t, rate in rates.items()}
            for row, of in results.items()
        },
        "differences": {
            text: {task: asdict(found) for task, found in by_task.items()}
            for text, by_task in differences.items()
        },
    }
    paradigm.store.write_table(markdown(results, differences, rates, dataset), values)


if __name__ == "__main__":
    main()
