"""What user signal is worth, and which: the same towers with more and more to read.

    python -m benchmarks.paradigm --dataset simulated|globo --out DIR [--seeds 0,1,2] [--first DAY]

Trained day by day, then frozen; the last day before the test for choosing, the newest two as the test
(`benchmarks/split.py`). Rows: item and context alone; the nightly features of the user, as SUM gives them
to others (K embeddings) and crossed with the candidate in full; events, cut where the nightly features
are, shuffled, and as they are; both. Below them what separates two rows: freshness is what events lose
when they are cut, order what they lose when they are shuffled (`benchmarks/histories.py`), so that the
paradigm is credited with neither. Reads the lake that `make run DATASET=...` built in HEADWATER_HOME;
each training is a file under --out, and a run that was killed goes on when the same is typed again.

NE: log loss over that of the constant at the base rate of the training days, averaged over seeds. A
difference has a 95 % interval by a paired bootstrap over users, all seeds at once: it says what other users
would have changed, and of other trainings only as much as there are seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from benchmarks.flags import check_names, listed
from benchmarks.results import Result
from benchmarks.trainings import Differences, Trainings, training_flags
from feature_store.errors import HeadwaterError

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
    ("events over SUM's embeddings, both of the night before", "sequence:stale", "sum"),
    ("freshness: events of today", "sequence", "sequence:stale"),
    ("order of the events", "sequence", "sequence:shuffled"),
    ("events beside nightly features", "hybrid", "hybrid:unseen"),
    ("nightly features beside events", "hybrid", "sequence"),
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = training_flags("paradigm", __doc__)
    cli.add_argument(
        "--change", type=listed, default=[], metavar="FIELD=VALUE",
        help="of all models with histories, as in `ours.py`: members=1",
    )  # fmt: skip
    cli.add_argument("--models", type=listed, default=list(ROWS), help="rows; default: all")
    return cli.parse_args(argv)


def answers(trainings: Trainings, results: Mapping[str, Sequence[Result]]) -> Differences:
    """Question -> task -> NE on the test of the first row less that of the second; of questions whose
    rows are both there."""
    return {
        text: trainings.differences(results[one], results[other])
        for text, one, other in QUESTIONS
        if one in results and other in results
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing and print the tables; they are kept as `paradigm.md` and `.json` too."""
    args = arguments(argv)
    try:
        check_names("--models", args.models, ROWS)
        trainings = Trainings.asked(args)
        names = {row: ":".join([row, *_changes(row, args.change)]) for row in args.models}
        found = trainings.run(list(names.values()))
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    results = {row: found[name] for row, name in names.items()}
    titled = {ROWS[row]: of for row, of in results.items()}
    trainings.write("paradigm", titled, answers(trainings, results))


def _changes(row: str, changes: Sequence[str]) -> Sequence[str]:
    return [] if row == "sum" else changes


if __name__ == "__main__":
    main()
