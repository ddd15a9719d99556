"""Sequential recommendation on MovieLens-1M by the protocol of HSTU (arXiv 2402.17152), with the encoders of `models`.

    python -m benchmarks.movielens --source <folder with ratings.dat or ratings.dat.gz>

Each user's last item is the test item, the one before it the validation item; a held-out item is
ranked among all items but those the user had before. Epoch by epoch the model is judged by the
validation items, and the best epoch is tested, once. `--refit` then trains again from the start,
for as many epochs, on the validation items too, and tests that as well: HSTU's public code trains on
those, and holds out the test items only. It also filters no more than the window of the last 200
items; rows 'window filtered' are so, and a little lower.

Inputs are those of HSTU's public code: items, their times, and the time at which the next one is
asked for (`--no-asked` leaves that out); `--ratings` adds what it leaves out, past ratings.
The state of a run is replaced after each epoch: the same command goes on where it was. Writes
`result.json` into --out. On a GPU in bfloat16 with the Triton kernel, else on --threads threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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
    model, train = ModelConfig(), TrainConfig()
    cli = argparse.ArgumentParser(
        prog="python -m benchmarks.movielens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("--source", type=Path, required=True, help="folder of ratings.dat[.gz]")
    cli.add_argument("--out", type=Path, help="default: var/movielens/<encoder>-<seed>")
    cli.add_argument("--encoder", choices=[e.value for e in Encoder], default=model.encoder)
    cli.add_argument("--layers", type=int, default=model.layers)
    cli.add_argument("--width", type=int, default=model.width)
    cli.add_argument("--head-dim", type=int, default=model.head_dim)
    cli.add_argument("--window", type=int, default=model.window, help="most inputs of a user")
    cli.add_argument("--dropout", type=float, default=model.dropout)
    cli.add_argument("--temperature", type=float, default=model.temperature)
    cli.add_argument("--ratings", action="store_true", help="past ratings are inputs too")
    cli.add_argument(
        "--asked",
        action=argparse.BooleanOptionalAction,
        default=model.asked,
        help="the time at which an item is asked for is an input",
    )
    cli.add_argument("--epochs", type=int, default=train.epochs)
    cli.add_argument("--users", type=int, default=train.users, help="of a batch")
    cli.add_argument("--rate", type=float, default=train.rate, help="highest learning rate")
    cli.add_argument("--decay", type=float, default=train.decay, help="weight decay")
    cli.add_argument("--average", type=float, default=train.average, help="of weights, per step")
    cli.add_argument("--patience", type=int, default=train.patience, help="evaluations")
    cli.add_argument("--every", type=int, default=train.every, help="epochs between evaluations")
    cli.add_argument("--seed", type=int, default=train.seed)
    cli.add_argument("--refit", action="store_true", help="train on the validation items as well")
    cli.add_argument(
        "--device",
        choices=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    cli.add_argument("--threads", type=int, default=1)
    return cli.parse_args(argv)


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments name."""
    given = vars(args)
    model = ModelConfig(**{name: given[name] for name in asdict(ModelConfig())})
    rest = [name for name in asdict(TrainConfig()) if name != "model"]
    return TrainConfig(model=model, **{name: given[name] for name in rest})


def fit(training: Training, epochs: int, console: Console, title: str) -> None:
    """Train with a bar on a terminal and a line per epoch anywhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=training.users)

        def step(users: int, loss: float) -> None:
            bar.update(task, advance=users, description=f"{title} loss {loss:.3f}")

        def report(record: Mapping[str, float]) -> None:
            found = "".join(f"  {name} {record[name]:.4f}" for name in SHOWN if name in record)
            console.print(
                f"{title} epoch {record['epoch']:3} of {epochs}  loss {record['loss']:.4f}"
                f"  {record['seconds']:.0f} s{found}"
            )
            bar.reset(task)

        if training.history and not training.done(epochs):
            console.print(f"{title} goes on after epoch {len(training.history)}")
        training.run(epochs, step=step, report=report)


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


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Select, test, and where asked refit and test; what `result.json` holds."""
    config = config_of(args)
    log = read(args.source).to(torch.device(args.device))
    out = args.out or Path(os.environ.get("HEADWATER_HOME", "var")) / "movielens" / (
        f"{args.encoder}-{args.seed}"
    )
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"{len(log.user):,} users, {log.items:,} items, {len(log.item):,} interactions; "
        f"state in {out}"
    )
    if log.rebuilt:
        console.print(REBUILT)
    select = Training(log, config, held_out=VALIDATION, path=out / "select.pt")
    fit(select, config.epochs, console, "select")
    best = {k: v for k, v in select.best.items() if k != "weights"}
    select.averaged.load_state_dict(select.best["weights"])
    result = {
        "config": asdict(config),
        "device": args.device,
        "epoch": best["epoch"],
        "seconds_per_epoch": sum(r["seconds"] for r in select.history) / len(select.history),
        "metrics": {"validation": {k: best[k] for k in ("users", *SHOWN)}, **tested(select, log)},
        "published": PUBLISHED,
        "timestamps": REBUILT if log.rebuilt else "as in the file",
        "history": select.history,
    }
    write(result, out)
    if args.refit:
        refit = Training(log, config, held_out=TEST, path=out / "refit.pt")
        fit(refit, best["epoch"], console, "refit")
        found = tested(refit, log)
        result["metrics"] |= {f"refit, {name}": value for name, value in found.items()}
        write(result, out)
    return result


def write(result: Mapping[str, Any], out: Path) -> None:
    """Replace `result.json` in one step."""
    write_atomically(out / "result.json", json.dumps(result, indent=1).encode())


def table(result: Mapping[str, Any]) -> Table:
    """Our figures, and the published ones below."""
    model = result["config"]["model"]
    ours = f"{model['encoder']}, {model['layers']} layers, {model['width']} wide"
    shown = Table(title=f"MovieLens-1M, {ours}, best epoch {result['epoch']}")
    shown.add_column("")
    for name in SHOWN:
        shown.add_column(name.upper(), justify="right")
    for name, row in {**result["metrics"], **result["published"]}.items():
        shown.add_row(name, *(f"{row[m]:.4f}" if m in row else "" for m in SHOWN))
    return shown


def main() -> None:
    """Run, print the table. Exit code 2: something a person can mend."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    console = Console(highlight=False, soft_wrap=True)
    try:
        result = run(args, console)
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    console.print(table(result))
    console.print(f"timestamps: {result['timestamps']}")


if __name__ == "__main__":
    main()
