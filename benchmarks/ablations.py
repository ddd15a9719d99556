"""What a change of a model is worth: variants of one, trained side by side, each less the first.

    python -m benchmarks.ablations --dataset simulated|globo --out DIR \\
        --models sequence,sequence:purchases=0,sequence:queries=2 [--seeds 0,1,2] [--first DAY]

Names are as in `benchmarks/ours.py`. Trained day by day, then frozen; the last day before the test for
choosing, the newest two as the test (`benchmarks/split.py`). Reads the lake that `make run DATASET=...`
built in HEADWATER_HOME; each training is a file under --out, and a run that was killed goes on when the
same is typed again.

NE: log loss over that of the constant at the base rate of the training days, averaged over seeds. A
difference has a 95 % interval by a paired bootstrap over users, all seeds at once: it says what other users
would have changed, and of other trainings only as much as there are seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.flags import listed
from benchmarks.trainings import Trainings, training_flags
from feature_store.errors import HeadwaterError


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = training_flags("ablations", __doc__)
    cli.add_argument(
        "--models", type=listed, required=True, help="the one to compare with, then its variants"
    )
    return cli.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing and print the tables; they are kept as `ablations.md`, `.json` and `.png`."""
    args = arguments(argv)
    try:
        trainings = Trainings.asked(args)
        results = trainings.run(args.models)
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    first, *others = results
    against = {
        f"{name}, less {first}": trainings.differences(results[name], results[first])
        for name in others
    }
    trainings.write("ablations", results, against)


if __name__ == "__main__":
    main()
