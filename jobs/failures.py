"""What went wrong, in one sentence, and the exit code that says whether trying again may help.

What is nobody's fault but ours has no sentence: its traceback is what we need.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sqlite3
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store import damage
from feature_store.errors import HeadwaterError, TransientError
from jobs.paths import own

if TYPE_CHECKING:
    from feature_store.spec import Dataset
    from jobs.settings import Settings

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

# Engines, deltalake, SQLite, torch and NumPy give a full disk as text only.
FULL_DISK = re.compile(
    "No space left on device|Disk quota exceeded|database or disk is full"
    r"|unexpected pos \d+ vs \d+|PytorchStreamWriter failed|\d+ requested and \d+ written"
)
DAMAGED_SQLITE = re.compile("file is not a database|database disk image is malformed")
_NO_ENGINE = re.compile("StatusCode.UNAVAILABLE|failed to connect to all addresses")
_NEARLY_NOTHING_BYTES = 2**20
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_IN_THE_WAY_TEXT = re.compile(r"Not a directory|Is a directory")
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FORBIDDEN_TEXT = re.compile(
    "Permission denied|Read-only file system|AccessDeniedException"
    "|attempt to write a readonly database|unable to open database file"
)
_MAX_TEXT = 300  # characters of somebody else's message


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A sentence for people, and the exit code: 2 where a person has to mend something, else 1."""

    code: int
    sentence: str


def report(
    error: BaseException, settings: Settings | None = None, dataset: Dataset | None = None
) -> int:
    """Print what happened to stderr, `error: ` and a sentence or a traceback; the exit code."""
    failure = explain(error, settings, dataset)
    if failure is None:
        traceback.print_exception(error)
        sys.stderr.flush()
        return FAILED
    print(f"error: {own(failure.sentence)}", file=sys.stderr, flush=True)
    return failure.code


def explain(
    error: BaseException, settings: Settings | None = None, dataset: Dataset | None = None
) -> Failure | None:
    """What `error` means for a person; None where it is a fault of the code.

    Args:
        settings: where the run reads and writes, as far as that is known.
        dataset: whose lake is looked through for damage that explains the error.
    """
    if isinstance(error, HeadwaterError):
        return Failure(code=USER_ERROR, sentence=_one_line(error))
    chain = list(_causes(error))
    home = settings.home if settings else "HEADWATER_HOME"
    if any(_is_full_disk(e) for e in chain) or (settings and is_full(settings.home)):
        return Failure(
            code=FAILED,
            sentence=f"the disk is full while writing under {home}: free some space, or move "
            "HEADWATER_HOME, and run the same command again",
        )
    lost = next((e for e in chain if isinstance(e, TransientError)), None)
    if lost is not None:
        return Failure(code=FAILED, sentence=_one_line(lost))
    return (
        _database(chain, settings)
        or _engine(chain, settings)
        or _path(chain)
        or _damage(settings, dataset)
    )


def is_full(folder: Path) -> bool:
    """Whether the disk that holds `folder` has no room for a page of a log or a database."""
    return folder.exists() and shutil.disk_usage(folder).free < _NEARLY_NOTHING_BYTES


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return FULL_DISK.search(str(error)) is not None


def _database(chain: list[BaseException], settings: Settings | None) -> Failure | None:
    """An SQLite database that is locked or damaged; MLflow's is the only one that jobs open."""
    if not any(isinstance(e, sqlite3.Error) for e in chain):
        return None
    said = " ".join(str(e) for e in chain)
    where = settings.mlflow_uri.removeprefix("sqlite:///") if settings else "under HEADWATER_HOME"
    if "database is locked" in said:
        return Failure(
            code=FAILED,
            sentence=f"MLflow's database {where} is locked by another process: end what holds it "
            f"(`fuser {shlex.quote(own(where))}` names it) and run the same command again",
        )
    if DAMAGED_SQLITE.search(said):
        return Failure(
            code=USER_ERROR,
            sentence=f"MLflow's database {where} is damaged: move it away and run the same command "
            "again, which starts a new one; tables, snapshots and champions do not depend on it",
        )
    return None


def _engine(chain: list[BaseException], settings: Settings | None) -> Failure | None:
    if not any(_NO_ENGINE.search(str(e)) for e in chain):
        return None
    remote = settings.spark_remote if settings else None
    which = f"SPARK_REMOTE is {remote}: the cluster" if remote else "the engine"
    return Failure(
        code=FAILED,
        sentence=f"{which} did not answer for a minute: see that it runs and can be reached, and "
        "run the same command again",
    )


def _path(chain: list[BaseException]) -> Failure | None:
    """A path of ours that cannot be made or written; engines and deltalake say so in text only."""
    for error in chain:
        number, path = getattr(error, "errno", None), getattr(error, "filename", None)
        text = f"{path}: {os.strerror(number)}" if path and number else _one_line(error)[:_MAX_TEXT]
        if number in _FORBIDDEN or _FORBIDDEN_TEXT.search(str(error)):
            remedy = "give this user the right to read and write it"
        elif number == errno.EEXIST and path and Path(path).is_dir():
            continue  # no file of somebody else's
        elif number in _IN_THE_WAY or _IN_THE_WAY_TEXT.search(str(error)):
            remedy = "move away what lies there"
        else:
            continue
        sentence = f"{text}: {remedy}, or choose another HEADWATER_HOME"
        return Failure(code=USER_ERROR, sentence=sentence)
    return None


def _damage(settings: Settings | None, dataset: Dataset | None) -> Failure | None:
    """Whether the lake's files are broken. Looking must not hide `error` behind one of its own."""
    if settings is None or dataset is None:
        return None
    try:
        damage.check(f"{settings.lake_root}/{dataset.name}", dataset)
    except damage.DamageError as found:
        return Failure(code=USER_ERROR, sentence=_one_line(found))
    except Exception:
        return None
    return None
