"""Sequential recommendation on MovieLens-1M by the protocol of HSTU (arXiv 2402.17152), with the encoders of `models`.

    python -m benchmarks.movielens --source <folder with ratings.dat or ratings.dat.gz>

Each user's last item is the test item, the one before it the validation item; a held-out item is
ranked among all items but those the user had before. Epoch by epoch the model is judged by the
validation items, and the best epoch is tested, once. `--refit` then trains again from the start,
for as many epochs, on the validation items too, and tests that as well: HSTU's public code trains on
those, and holds out the test items only. It also filters no more than the window of the last 200
items; rows 'window filtered' are so, and a little lower.

Inputs are those of HSTU's public code: items, their times, and the time at which the next one is
asked for (`--no-asked` leaves that out). Writes `result.json` into --out. On a GPU in bfloat16 with
the Triton kernel, else on --threads threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import parser
from benchmarks.movielens.data import REBUILT_USER, TEST, VALIDATION, Log, read
from benchmarks.movielens.model import ModelConfig
from benchmarks.movielens.training import TrainConfig, Training, metrics, rank_held_out
from feature_store.errors import HeadwaterError
from jobs.training.checkpoints import write_atomically
from models.encoders import Encoder

# arXiv 2402.17152, section 4.1.1, and github.com/facebookresearch/generative-recommenders
PUBLISHED = {
    "SASRec (published)": {"hr@10": 0.2853, "hr@50": 0.5474, "ndcg@10": 0.1603},
    "HSTU (published)": {"hr@10": 0.3097, "hr@50": 0.5754, "ndcg@10": 0.1720},
    "HSTU-large (published)": {"hr@10": 0.3294, "hr@50": 0.5935, "ndcg@10": 0.1893},
}
SHOWN = ("hr@10", "ndcg@10", "hr@50", "mrr")
REBUILT = (
    "Of this copy of MovieLens-1M 15.5 % of the timestamps (ratings of 3 or less of users 3000 and up) "
    "were rebuilt by interpolation; the order of a user's interactions is exact. Rows 'users below "
    f"{REBUILT_USER}' are of users whose timestamps are all exact."
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = parser("movielens", __doc__)
    cli.add_argument("--source", type=Path, required=True, help="folder of ratings.dat[.gz]")
    cli.add_argument("--out", type=Path, help="default: var/movielens/<encoder>-<seed>")
    cli.add_argument("--encoder", type=Encoder, choices=list(Encoder), default=Encoder.HSTU)
    cli.add_argument(
        "--asked",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the time at which an item is asked for is an input",
    )
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--refit", action="store_true", help="train on the validation items as well")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    cli.add_argument("--device", choices=devices, default=devices[0])
    cli.add_argument("--threads", type=int, default=1)
    return cli.parse_args(argv)


def said(title: str, record: Mapping[str, float]) -> None:
    """A line of progress for an epoch."""
    found = "".join(f"  {name} {record[name]:.4f}" for name in SHOWN if name in record)
    print(
        f"{title} epoch {record['epoch']:3}  loss {record['loss']:.4f}  {record['seconds']:.0f} s{found}",
        flush=True,
    )


def tested(training: Training, log: Log) -> dict[str, dict[str, float]]:
    """Metrics of the averaged weights on the test items: of all users, of those whose timestamps are
    all exact, and of all against the candidates of HSTU's public code."""
    model, window = training.averaged, training.config.model.window
    rank = rank_held_out(model, log, place=TEST)
    found = {"test": metrics(rank)}
    found["test, window filtered"] = metrics(rank_held_out(model, log, place=TEST, filtered=window))
    if log.rebuilt:
        found[f"test, users below {REBUILT_USER}"] = metrics(rank[log.user < REBUILT_USER])
    return found


def run(log: Log, config: TrainConfig, *, refit: bool) -> dict[str, Any]:
    """Select, test, and where asked refit and test; what `result.json` holds."""
    select = Training(log, config, held_out=VALIDATION)
    select.run(config.epochs, report=partial(said, "select"))
    best = {k: v for k, v in select.best.items() if k != "weights"}
    select.averaged.load_state_dict(select.best["weights"])
    found = {"validation": {k: best[k] for k in ("users", *SHOWN)}, **tested(select, log)}
    if refit:
        again = Training(log, config, held_out=TEST)
        again.run(best["epoch"], report=partial(said, "refit"))
        found |= {f"refit, {name}": value for name, value in tested(again, log).items()}
    return {
        "config": asdict(config),
        "device": log.item.device.type,
        "epoch": best["epoch"],
        "seconds_per_epoch": sum(r["seconds"] for r in select.history) / len(select.history),
        "metrics": found,
        "published": PUBLISHED,
        "timestamps": REBUILT if log.rebuilt else "as in the file",
        "history": select.history,
    }


def table(result: Mapping[str, Any]) -> str:
    """Our figures, and the published ones below."""

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:40}" + "".join(f"{cell:>9}" for cell in cells)

    rows = {**result["metrics"], **result["published"]}
    return "\n".join(
        [line(f"best epoch {result['epoch']}", (name.upper() for name in SHOWN))]
        + [line(n, (f"{r[m]:.4f}" if m in r else "" for m in SHOWN)) for n, r in rows.items()]
    )


def main(argv: list[str] | None = None) -> None:
    """Run, print the table. Exit code 2: something a person can mend."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    home = Path(os.environ.get("HEADWATER_HOME", "var"))
    out = args.out or home / "movielens" / f"{args.encoder}-{args.seed}"
    model = ModelConfig(encoder=args.encoder, asked=args.asked)
    try:
        log = read(args.source).to(torch.device(args.device))
        print(f"{len(log.user):,} users, {log.items:,} items, {len(log.item):,} interactions")
        result = run(log, TrainConfig(model=model, seed=args.seed), refit=args.refit)
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "result.json", json.dumps(result, indent=1).encode())
    print(f"{table(result)}\ntimestamps: {result['timestamps']}")


if __name__ == "__main__":
    main()
