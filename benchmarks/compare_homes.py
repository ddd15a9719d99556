"""Two homes of a dataset, built in another order or on another engine: are they the same?

    python -m benchmarks.compare_homes --dataset simulated --first 2024-03-01 --last 2024-03-10 HOME OTHER

Prints, per table, whether the rows of the days are the same to the bit, and per model whether the
champion of every day is (a snapshot's id is a hash of its weights). Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from feature_store import datasets
from feature_store.days import day_range
from feature_store.lake import Lake
from feature_store.spec import Dataset
from feature_store.tables import contracts
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints


def rows(home: Path, dataset: Dataset, table: str, days: list[str]) -> pa.Table:
    """The rows of `days` in the order of the table's key."""
    lake = Lake(home / "lake", dataset)
    found = lake.read(table, days=days)
    key = dict.fromkeys((*lake.contract(table).partitioned_by, *lake.contract(table).key))
    return found.sort_by([(k, "ascending") for k in key])


def same(one: pa.Array, other: pa.Array) -> bool:
    """Whether two columns hold the same bits; missing numbers, which are NaN, count as equal."""
    if isinstance(one, pa.ChunkedArray):
        one, other = one.combine_chunks(), other.combine_chunks()
    if one.equals(other):
        return True
    if len(one) != len(other) or one.null_count != other.null_count:
        return False
    if pa.types.is_list(one.type):
        lengths = one.value_lengths().equals(other.value_lengths())
        return lengths and same(one.flatten(), other.flatten())
    if pa.types.is_floating(one.type):
        mine, theirs = (x.to_numpy(zero_copy_only=False) for x in (one, other))
        return np.array_equal(mine, theirs, equal_nan=True)
    return False


def tables_differ(
    homes: tuple[Path, Path], dataset: Dataset, days: list[str], tables: list[str]
) -> bool:
    """Whether any table differs; prints a line for each."""
    differ = False
    for table in tables:
        one, other = (rows(home, dataset, table, days) for home in homes)
        unlike = [c for c in one.column_names if not same(one[c], other[c])]
        differ |= bool(unlike)
        verdict = f"DIFFER in {', '.join(unlike)}" if unlike else "the same"
        print(f"{table:18} {one.num_rows:>10,} rows   {verdict}", flush=True)
    return differ


def champions_differ(homes: tuple[Path, Path], dataset: Dataset, days: list[str]) -> bool:
    """Whether any day's champion differs; prints a line for each model."""
    differ = False
    for model in dataset.models:
        ids = [_champions(home, dataset, model, days) for home in homes]
        unlike = [day for day, one, other in zip(days, *ids, strict=True) if one != other]
        differ |= bool(unlike)
        verdict = f"DIFFER on {', '.join(unlike)}" if unlike else f"the same, now {ids[0][-1]}"
        print(f"champions of {model:11} {len(days)} days   {verdict}", flush=True)
    return differ


def _champions(home: Path, dataset: Dataset, model: str, days: list[str]) -> list[str | None]:
    settings = Settings.from_env({"HEADWATER_HOME": str(home)})
    checkpoints = Checkpoints(settings.snapshot_dir(dataset.name, model, days[0]).parent)
    found = [checkpoints.newest_champion(day) for day in days]
    return [None if champion is None else champion.id for champion in found]


def main() -> None:
    """Compare, print."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("homes", nargs=2, type=Path, metavar="HOME")
    cli.add_argument("--dataset", required=True)
    cli.add_argument("--first", required=True)
    cli.add_argument("--last", required=True)
    args = cli.parse_args()
    dataset, days = datasets.get(args.dataset), day_range(args.first, args.last)
    homes = (args.homes[0].resolve(), args.homes[1].resolve())
    tables = [t for t in contracts(dataset) if Lake(homes[0] / "lake", dataset).exists(t)]
    differ = tables_differ(homes, dataset, days, tables)
    differ |= champions_differ(homes, dataset, days)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
