"""The labels that became final on one day, by the row of `examples` that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.columns import NO_LABEL
from feature_store.errors import DataError
from feature_store.spec import Dataset
from jobs.training.ids import int64_ids
from jobs.training.rows import jagged


@dataclass(frozen=True, kw_only=True)
class _TaskLabels:
    users: np.ndarray  # sorted by (user, part)
    parts: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    values: np.ndarray  # int8


class Labels:
    """Labels of the rows shown on one day, of the tasks whose labels a table of labels holds.

    Args:
        dataset: gives the order of tasks.
        table: columns user_id, part, task, labels; rows of one `shown_ds`. Small: it is held in
            memory, a byte per label.
        tasks: tasks to read; others stay NO_LABEL.
    """

    def __init__(self, dataset: Dataset, table: pa.Table, *, tasks: Sequence[str]) -> None:
        self.dataset = dataset
        self._tasks: dict[int, _TaskLabels] = {}
        for index, task in enumerate(dataset.tasks):
            if task.name not in tasks:
                continue
            mine = table.filter(pc.equal(table["task"], task.name)).combine_chunks()
            if mine.num_rows == 0:
                continue
            users = int64_ids(_one(mine["user_id"]))
            parts = _one(mine["part"]).to_numpy().astype(np.int64)
            values, offsets = jagged(_one(mine["labels"]))
            order = np.lexsort((parts, users))
            self._tasks[index] = _TaskLabels(
                users=users[order],
                parts=parts[order],
                starts=offsets[:-1][order],
                lengths=np.diff(offsets)[order],
                values=values.astype(np.int8),
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that have labels here."""
        return tuple(self.dataset.tasks[i].name for i in self._tasks)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Per task: positives and labels."""
        return {
            self.dataset.tasks[i].name: (
                int((t.values == 1).sum()),
                int((t.values != NO_LABEL).sum()),
            )
            for i, t in self._tasks.items()
        }

    def labelled(self, users: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Which rows (user int64, part), each (R,), have labels of any task: bool (R,)."""
        found = np.zeros(len(users), bool)
        for task in self._tasks.values():
            found |= self._find(task, users, parts)[1]
        return found

    def of_rows(
        self, users: np.ndarray, parts: np.ndarray, target_offsets: np.ndarray
    ) -> np.ndarray:
        """Labels of the rows' targets: (T, n_tasks) int32, NO_LABEL where there is none.

        Args:
            users, parts: (R,) which rows.
            target_offsets: (R+1,) int64, their targets.

        Raises:
            DataError: a row has another number of labels than targets.
        """
        total = int(target_offsets[-1])
        out = np.full((total, len(self.dataset.tasks)), NO_LABEL, np.int32)
        lengths = np.diff(target_offsets)
        for index, task in self._tasks.items():
            place, found = self._find(task, users, parts)
            place, rows = place[found], np.nonzero(found)[0]
            wrong = task.lengths[place] != lengths[rows]
            if wrong.any():
                row = rows[wrong][0]
                raise DataError(
                    f"labels of task {self.dataset.tasks[index].name} for user {users[row]} part "
                    f"{parts[row]}: {task.lengths[place[wrong][0]]} labels for {lengths[row]} targets: "
                    "the examples were rebuilt after the labels; run build_labels again"
                )
            count = lengths[rows]
            within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            target = np.repeat(target_offsets[:-1][rows], count) + within
            out[target, index] = task.values[np.repeat(task.starts[place], count) + within]
        return out

    @staticmethod
    def _find(
        task: _TaskLabels, users: np.ndarray, parts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each (user, part) lies among the task's rows, and whether it is there."""
        place = np.searchsorted(task.users, users)
        place = np.minimum(place, len(task.users) - 1)
        found = task.users[place] == users
        # The parts of one user-day are numbered from 0 and lie together: step to the wanted one.
        # Deleted or unlabelled parts leave gaps, so step by comparing, not by adding.
        for _ in range(int(parts.max(initial=0)) + 1):
            behind = found & (task.parts[place] < parts)
            if not behind.any():
                break
            following = np.minimum(place + 1, len(task.users) - 1)
            moved = behind & (following > place) & (task.users[following] == users)
            place = np.where(moved, following, place)
            found &= ~behind | moved
        return place, found & (task.parts[place] == parts)


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
