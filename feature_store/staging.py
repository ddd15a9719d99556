"""Folders to write into before anything is published."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow.fs as pafs

_ABANDONED_AFTER = timedelta(days=1)


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

        Removed at the end. On a local root one process at a time has it, and the next one removes
        what a killed one left; elsewhere what is left is removed when it is a day old.
        """
        home = f"{self.base}/_staging/{name}/{partition_folder(values)}"
        self.filesystem.create_dir(home)
        with self._locked(f"{home}/.lock"):
            self._remove_abandoned(home)
            folder = f"{home}/{uuid.uuid4().hex}"
            try:
                yield folder
            finally:
                if self.filesystem.get_file_info(folder).type == pafs.FileType.Directory:
                    self.filesystem.delete_dir(folder)

    def _locked(self, path: str) -> AbstractContextManager[object]:
        if self.remote:  # an object store has no locks: the commit's conflict check decides there
            return nullcontext()
        from filelock import FileLock

        return FileLock(path)

    def _remove_abandoned(self, home: str) -> None:
        # Under the lock whatever lies here is a dead writer's. Without one it may be a living one's.
        since = datetime.now(UTC) - (_ABANDONED_AFTER if self.remote else timedelta(0))
        for info in self.filesystem.get_file_info(pafs.FileSelector(home)):
            if info.type == pafs.FileType.Directory:
                inside = self.filesystem.get_file_info(pafs.FileSelector(info.path, recursive=True))
                times = [i.mtime for i in inside if i.mtime is not None]
                if not self.remote or (times and max(times) < since):
                    self.filesystem.delete_dir(info.path)
