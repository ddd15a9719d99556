"""Flags that programs share."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from pathlib import Path

from feature_store.errors import SpecError


def flags(program: str, about: str | None, *, seeds: str = "0") -> argparse.ArgumentParser:
    """A command line with --out and --seeds, whose default is `seeds`; otherwise as `parser`."""
    cli = parser(program, about)
    cli.add_argument("--out", type=Path, required=True, help="where everything is kept")
    cli.add_argument(
        "--seeds", type=listed, default=listed(seeds), help=f"of every training, default {seeds}"
    )
    return cli


def parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """A command line without flags.

    Args:
        program: under `benchmarks`, dotted.
        about: what `--help` says first.
    """
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def listed(text: str) -> list[str]:
    """What a flag lists, separated by commas."""
    return [x for x in text.split(",") if x]


def check_names(flag: str, names: Iterable[str], known: Collection[str]) -> None:
    """Nothing, where a flag names what there is.

    Raises:
        SpecError: it names something else.
    """
    for name in names:
        if name not in known:
            raise SpecError(f"{flag}: {name!r} is none of {', '.join(known)}; name some of these")
