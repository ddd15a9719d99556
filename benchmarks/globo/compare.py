"""Our models and LightGBM side by side on Globo.com's clicks: same rows, same features, same split.

    python -m benchmarks.globo.compare --out DIR [--models sequence,...] [--seeds 0,1,2] [--peer-seeds 0]

Trained on what was shown 2 to 11 October 2017, chosen and stopped by the 12th, tested on the 13th
and 14th; all users, since the split is in time. Reads the lake that `make run DATASET=globo ...` built
in HEADWATER_HOME. Each day's rows, each trial and each result is a file under --out: a run that was
killed at any point goes on when the same is typed again.

NE: log loss over that of the constant at the base rate of the training days. A difference is to LightGBM,
with a paired bootstrap over users. `continue` and `return_24h` are tested on as many days as the lake has
answers for.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.flags import check_names, flags, listed
from benchmarks.globo import table
from benchmarks.globo.data import SPLIT, Flat, concat, flat_day
from benchmarks.globo.lightgbm_peer import NAME as PEER
from benchmarks.globo.lightgbm_peer import LightGbm
from benchmarks.globo.ours import Ours
from benchmarks.globo.results import Predictions, Result, Store
from benchmarks.globo.split import Split, base_rates, pins
from feature_store import datasets
from feature_store.errors import HeadwaterError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.settings import Settings


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = flags("globo.compare", __doc__)
    cli.add_argument("--peers", type=listed, default=[PEER], help=f"{PEER}, or none: ''")
    cli.add_argument("--models", type=listed, default=["sequence"], help="presets of ours")
    cli.add_argument(
        "--peer-seeds",
        type=listed,
        help="default: --seeds; a single one stands against all of ours",
    )
    cli.add_argument("--tasks", type=listed, default=[], help="default: all")
    cli.add_argument(
        "--peer-tasks", type=listed, default=[], help="of --tasks, that peers are trained for; default: all"
    )  # fmt: skip
    cli.add_argument("--share", type=float, default=1.0, help="of all users, to try things out")
    cli.add_argument(
        "--tuning-share", type=float, default=0.25, help="of those, for trials of peers"
    )
    cli.add_argument("--first", default=SPLIT.train[0], help="day to train from")
    return cli.parse_args(argv)


class Comparison:
    """One comparison: the data, and where results are kept.

    Args:
        lake, dataset: of the rows.
        args: of the command line.
        split: of the days.

    Raises:
        SpecError: a name is unknown.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, args: argparse.Namespace, split: Split | None = None
    ) -> None:
        self.lake, self.dataset, self.args = lake, dataset, args
        self.split = split or replace(SPLIT, train=(args.first, SPLIT.train[1]))
        known = [t.name for t in dataset.tasks]
        self.tasks = args.tasks or known
        check_names("--tasks", self.tasks, known)
        self.peer_tasks = args.peer_tasks or self.tasks
        check_names("--peer-tasks", self.peer_tasks, self.tasks)
        check_names("--peers", args.peers, [PEER])
        self.store = Store(args.out / f"results-{args.share:g}")
        self.about = {
            "share": args.share, "spec": dataset.hash, "split": asdict(self.split),
            "pins": pins(lake),
        }  # fmt: skip
        self.peer = LightGbm(args.out / "trials", tuning_share=args.tuning_share, about=self.about)
        self.command = "python -m benchmarks.globo.compare " + shlex.join(sys.argv[1:])

    def base_rates(self) -> dict[str, float]:
        """Of the training days, by task."""
        return base_rates(self.lake, self.dataset, self.split.days("train"), self.tasks)

    def rows(self, part: str, task: str) -> Flat:
        """The rows of a part that have a label of `task`."""
        folder, share = self.args.out / "data", self.args.share
        days = (
            flat_day(self.lake, self.dataset, ds, share=share, folder=folder)
            for ds in self.split.days(part)
        )
        return concat([day.where(day.of_task(task)) for day in days])

    def run(self) -> list[Result]:
        """Every model and seed that was asked for: what is done, is read."""
        peer_seeds, seeds = self.args.peer_seeds or self.args.seeds, self.args.seeds
        found = [
            self._peer(task, int(seed))
            for seed in peer_seeds
            if self.args.peers
            for task in self.peer_tasks
        ]
        return found + [self._ours(m, int(seed)) for seed in seeds for m in self.args.models]

    def _peer(self, task: str, seed: int) -> Result:
        def train() -> tuple[Predictions, dict[str, Any]]:
            parts = {part: self.rows(part, task) for part in ("train", "validation", "test")}
            return self.peer.run(task, parts, seed)

        return self._once(PEER, [task], seed, self.peer, train)

    def _ours(self, model: str, seed: int) -> Result:
        ours = Ours(self.lake, self.dataset, model, self.split, share=self.args.share)
        return self._once(model, self.tasks, seed, ours, lambda: ours.run(self.tasks, seed))

    def _once(
        self, name: str, tasks: Sequence[str], seed: int, model: LightGbm | Ours, train: Any
    ) -> Result:
        def said() -> tuple[Predictions, dict[str, Any]]:
            print(f"{name} {' '.join(tasks)} seed {seed}", flush=True)
            predictions, facts = train()
            return predictions, {**facts, "command": self.command}

        config = {"data": self.about, "model": model.config()}
        return self.store.once(name, tasks, seed, config, said)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table; it is kept as `table.md` and `table.json` too."""
    args = arguments(argv)
    dataset = datasets.get("globo")
    try:
        comparison = Comparison(Lake(Settings.from_env().lake_root, dataset), dataset, args)
        lines = table.lines(comparison.run(), comparison.base_rates())
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    comparison.store.write_table(table.markdown(lines), lines)


if __name__ == "__main__":
    main()
