"""How a dataset's models are made: one TOML file per dataset, by its name, and `base.toml` for the rest.

Plain data, so that a spec knows which models there are without loading torch; `jobs/training/presets.py`
gives the values their types.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from feature_store.errors import SpecError

FOLDER = Path(__file__).parent
_UPSTREAM, _DOWNSTREAM = "upstream", "downstream"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Settings as a file has them, and `where`: the file, and the entry in it."""

    values: dict[str, Any]
    where: str


def upstream(dataset: str) -> dict[str, Entry]:
    """The upstream models that `dataset` can name: its own file's, and those of `base.toml` beside them.

    Raises:
        SpecError: a file is no TOML, or holds something else.
    """
    return {
        name: Entry(values=values, where=f"{_name(path)}: {_UPSTREAM}.{name}")
        for path in _files(dataset)
        for name, values in _read(path)[_UPSTREAM].items()
    }


def downstream(dataset: str) -> Entry:
    """The settings of the downstream models of `dataset`.

    Raises:
        SpecError: as of `upstream`.
    """
    path = _files(dataset)[-1]
    return Entry(values=_read(path)[_DOWNSTREAM], where=f"{_name(path)}: {_DOWNSTREAM}")


def check_models(field: str, models: Iterable[str], dataset: str) -> None:
    """Refuse a name that no entry has.

    Raises:
        SpecError: names the known ones, and the nearest.
    """
    known = upstream(dataset)
    for model in models:
        if model not in known:
            near = difflib.get_close_matches(str(model), known, n=1)
            raise SpecError(
                f"{field} has {model!r}, and no model is called so: "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"known are {', '.join(known)}; a new one gets an entry in "
                f"feature_store/presets/{dataset}.toml"
            )


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _files(dataset: str) -> list[Path]:
    base, own = FOLDER / "base.toml", FOLDER / f"{dataset}.toml"
    return [base, own] if own.is_file() else [base]


@cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{_name(path)} is no TOML: {error}; mend that line") from None
    for name in values:
        if name not in (_UPSTREAM, _DOWNSTREAM):
            raise SpecError(
                f"{_name(path)} has [{name}]: tables are [{_UPSTREAM}.<model>] and [{_DOWNSTREAM}]"
            )
    found = {_UPSTREAM: {}, _DOWNSTREAM: {}} | values
    for name, entry in {**found[_UPSTREAM], _DOWNSTREAM: found[_DOWNSTREAM]}.items():
        if not isinstance(entry, dict):
            raise SpecError(
                f"{_name(path)} has {name} = {entry!r}: a table of settings is expected"
            )
    return found
