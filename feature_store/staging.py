"""Folders to write into before anything is published."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

ABANDONED_AFTER = timedelta(days=1)
_FIRST_NOTICE_SECONDS, _NEXT_NOTICE_SECONDS = 5, 60
_MAX_COMMAND = 300  # characters


def partition_folder(values: Mapping[str, str]) -> str:
    """`ds=2024-05-01`: where a partition lies in its table's folder."""
    return "/".join(f"{column}={value}" for column, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Staging:
    """`<base>/_staging`, beside the tables that are written from it.

    Args:
        filesystem: that `base` is a path of.
        remote: an object store, which has no locks.
    """

    filesystem: pafs.FileSystem
    base: str
    remote: bool

    @contextmanager
    def open(self, name: str, values: Mapping[str, str]) -> Iterator[str]:
        """A path for the partition `values` of `name`, not made yet, inside `filesystem`.

        Removed at the end. On a local root one process at a time has it: whoever waits says for
        whom, and the kernel gives on what a killed process held. The next one removes what that
        one left; elsewhere what is left is removed when it is a day old.
        """
        home = f"{self.base}/_staging/{name}/{partition_folder(values)}"
        self.filesystem.create_dir(home)
        with self._locked(home):
            self._remove_abandoned(home)
            folder = f"{home}/{uuid.uuid4().hex}"
            try:
                yield folder
            finally:
                if self.filesystem.get_file_info(folder).type == pafs.FileType.Directory:
                    self.filesystem.delete_dir(folder)

    def _locked(self, home: str) -> AbstractContextManager[object]:
        # An object store has no locks: the commit's conflict check decides there.
        return nullcontext() if self.remote else _held(Path(home))

    def _remove_abandoned(self, home: str) -> None:
        # Under the lock whatever lies here is a dead writer's. Without one it may be a living one's.
        since = datetime.now(UTC) - (ABANDONED_AFTER if self.remote else timedelta(0))
        for info in self.filesystem.get_file_info(pafs.FileSelector(home)):
            if info.type == pafs.FileType.Directory:
                inside = self.filesystem.get_file_info(pafs.FileSelector(info.path, recursive=True))
                times = [i.mtime for i in inside if i.mtime is not None]
                if not self.remote or (times and max(times) < since):
                    self.filesystem.delete_dir(info.path)


@contextmanager
def _held(home: Path) -> Iterator[None]:
    """The lock of the folder `home`, with a note beside it of who has it."""
    lock, note = FileLock(home / ".lock"), home / ".holder"
    wait_seconds = _FIRST_NOTICE_SECONDS
    while True:
        try:
            lock.acquire(timeout=wait_seconds)
            break
        except Timeout:
            what = home.as_posix().rpartition("/_staging/")[2]
            print(f"waiting for {what}: {_holder(note)}", flush=True)
            wait_seconds = _NEXT_NOTICE_SECONDS
    try:
        command = shlex.join(["python", *sys.orig_argv[1:]])[:_MAX_COMMAND]
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        note.write_text(json.dumps(holder | {"command": command}))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(note: Path) -> str:
    """Who holds a lock and for how long, as far as its note tells."""
    try:
        holder = json.loads(note.read_text())
        minutes = (time.time() - holder["since"]) / 60
        return (
            f"process {holder['pid']} on {holder['host']} has it for {minutes:.1f} min "
            f"({holder['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process has it"
