"""Our models and public ones side by side on Globo.com's clicks: same rows, same features, same split.

    python -m benchmarks.globo.compare --out DIR [--peers lightgbm,din,dien,transact] [--models sequence,...]

Trained on what was shown 2 to 11 October 2017, chosen and stopped by the 12th, tested on the 13th
and 14th; all users, since the split is in time. Reads the lake that `make run DATASET=globo ...` built
in HEADWATER_HOME. Each day's rows, each trial and each result is a file under --out: a run that was
killed at any point goes on when the same is typed again. DIN, DIEN, TransAct and BST are FuxiCTR's
(https://github.com/reczoo/FuxiCTR), imported from a clone that --fuxictr names.

NE: log loss over that of the constant at the base rate of the training days. A difference is to the peer
that is best on the validation day, with a paired bootstrap over users. `continue` and `return_24h`
are tested on as many days as the lake has answers for.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.flags import check_names, flags, listed
from benchmarks.globo import table
from benchmarks.globo.data import SPLIT, Flat, concat, flat_day
from benchmarks.results import Result, Store
from benchmarks.split import Split, base_rates, pins
from feature_store import datasets
from feature_store.errors import HeadwaterError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.settings import Settings

CLICKS = ("click", "click_matched")
FUXICTR = ("din", "dien", "transact", "bst")
PEERS = ("lightgbm", *FUXICTR)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = flags("globo.compare", __doc__)
    cli.add_argument("--peers", type=listed, default=["lightgbm"], help=f"of {', '.join(PEERS)}")
    cli.add_argument("--models", type=listed, default=["sequence"], help="presets of ours")
    cli.add_argument(
        "--peer-seeds",
        type=listed,
        help="default: --seeds; a single one stands against all of ours",
    )
    cli.add_argument("--tasks", type=listed, default=[], help="default: all")
    cli.add_argument(
        "--peer-tasks",
        type=listed,
        default=[],
        help="of --tasks, that peers are trained for; default: all (FuxiCTR: the clicks)",
    )
    cli.add_argument("--share", type=float, default=1.0, help="of all users, to try things out")
    cli.add_argument(
        "--tuning-share", type=float, default=0.25, help="of those, for trials of peers"
    )
    cli.add_argument("--first", default=SPLIT.train[0], help="day to train from")
    cli.add_argument("--fuxictr", type=Path, help="a clone of github.com/reczoo/FuxiCTR")
    return cli.parse_args(argv)


class Comparison:
    """One comparison: the data, and where results are kept.

    Args:
        lake, dataset: of the rows.
        args: of the command line.
        split: of the days.
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
        check_names("--peers", args.peers, PEERS)
        for name in args.peers:
            if name in FUXICTR:
                from benchmarks.globo.fuxictr_peers import checked_clone

                checked_clone(args.fuxictr, name)
        self.store = Store(args.out / f"results-{args.share:g}")
        self.command = "python -m benchmarks.globo.compare " + shlex.join(sys.argv[1:])

    def rows(self, part: str, task: str) -> Flat:
        """The rows of a part that have a label of `task`."""
        days = (self._day(ds) for ds in self.split.days(part))
        return concat([day.where(day.of_task(task)) for day in days])

    def _day(self, ds: str) -> Flat:
        folder = self.args.out / "data"
        return flat_day(self.lake, self.dataset, ds, share=self.args.share, folder=folder)

    def about(self) -> dict[str, Any]:
        """What of the data a result depends on."""
        return {
            "share": self.args.share, "spec": self.dataset.hash, "split": asdict(self.split),
            "pins": pins(self.lake),
        }  # fmt: skip

    def base_rates(self) -> dict[str, float]:
        """Of the training days, by task."""
        return base_rates(self.lake, self.dataset, self.split.days("train"), self.tasks)

    def run(self) -> list[Result]:
        """Every model and seed that was asked for: what is done, is read."""
        found = []
        for seed in map(int, self.args.peer_seeds or self.args.seeds):
            for peer in self.args.peers:
                for task in self.peer_tasks if peer == "lightgbm" else self._clicks():
                    found.append(self._peer(peer, task, seed))
        for seed in map(int, self.args.seeds):
            for model in self.args.models:
                found.append(self._ours(model, seed))
        return found

    def _clicks(self) -> list[str]:
        return [t for t in self.peer_tasks if t in CLICKS]

    def _peer(self, name: str, task: str, seed: int) -> Result:
        about = self.about()
        trials, share = self.args.out / "trials", self.args.tuning_share
        peer: Any
        if name == "lightgbm":
            from benchmarks.globo.lightgbm_peer import LightGbm

            peer = LightGbm(trials, tuning_share=share, about=about)
        else:
            from benchmarks.globo.fuxictr_peers import FuxiCtr

            first = self._clicks()[0]
            peer = FuxiCtr(
                self.args.fuxictr, name, trials, tuning_share=share, about=about,
                tuning_task=first, tuning_rows=lambda part: self.rows(part, first),
            )  # fmt: skip

        def train() -> Any:
            print(f"{name} {task} seed {seed}", flush=True)
            parts = {part: self.rows(part, task) for part in ("train", "validation", "test")}
            predictions, facts = peer.run(task, parts, seed)
            return predictions, {**facts, "command": self.command}

        return self.store.once(name, [task], seed, {"data": about, "model": peer.config()}, train)

    def _ours(self, model: str, seed: int) -> Result:
        from benchmarks.ours import Ours

        ours = Ours(self.lake, self.dataset, model, self.split, share=self.args.share)

        def train() -> Any:
            print(f"{model} seed {seed}", flush=True)
            predictions, facts = ours.run(self.tasks, seed)
            return predictions, {**facts, "command": self.command}

        config = {"data": self.about(), "model": ours.config()}
        return self.store.once(model, self.tasks, seed, config, train)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table; it is kept as `table.md` and `table.json` too."""
    args = arguments(argv)
    dataset = datasets.get("globo")
    try:
        comparison = Comparison(Lake(Settings.from_env().lake_root, dataset), dataset, args)
        lines = table.lines(comparison.run(), args.peers, comparison.base_rates())
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    comparison.store.write_table(table.markdown(lines), [asdict(line) for line in lines])


if __name__ == "__main__":
    main()
