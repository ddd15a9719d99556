"""What the jobs that train leave of a day beside its snapshot: `result.json`, and predictions in Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    import pandas as pd

RESULT, EVALUATION, PREDICTIONS = "result.json", "evaluation.parquet", "predictions.parquet"


@dataclass(frozen=True, kw_only=True)
class Results:
    """The files of one upstream model, or of one downstream task, by day.

    Args:
        root: `<root>/<ds>/` holds those of a day.
        command: what a person types to write the files of a day again.
    """

    root: Path
    command: Callable[[str], str]

    @classmethod
    def upstream(cls, settings: Settings, dataset: str, model: str) -> Results:
        """Of an upstream model."""
        root = settings.snapshot_dir(dataset, model, "")
        return cls(root=root, command=Checkpoints(root).command)

    @classmethod
    def downstream(cls, settings: Settings, dataset: str, task: str) -> Results:
        """Of the downstream models of a task."""
        command = f"python -m jobs train_downstream --dataset {dataset} --task {task} --ds "
        return cls(root=settings.downstream_dir(dataset, task), command=command.__add__)

    def until(self, ds: str) -> dict[str, dict[str, Any]]:
        """Results of the days up to `ds` that have one, by day, ascending.

        Raises:
            DataError: one of them is damaged.
        """
        days = sorted(p.parent.name for p in self.root.glob(f"*/{RESULT}"))
        return {day: self._read(day) for day in days if day <= ds}

    def of(self, ds: str) -> dict[str, Any] | None:
        """The result of a day, if there is one.

        Raises:
            DataError: it is damaged.
        """
        return self._read(ds) if (self.root / ds / RESULT).exists() else None

    def rows(self, ds: str, name: str, *, task: str | None = None) -> pd.DataFrame:
        """The predictions in file `name` of a day, those of `task` alone where it is given.

        Raises:
            DataError: the file is damaged, or gone.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.root / ds / name
        try:
            filters = None if task is None else [("task", "==", task)]
            return pq.read_table(path, filters=filters).to_pandas()
        except PermissionError:
            raise
        except (OSError, pa.ArrowException):
            raise self._lost(path, ds) from None

    def _read(self, ds: str) -> dict[str, Any]:
        path = self.root / ds / RESULT
        try:
            result = json.loads(path.read_bytes())
        except ValueError:
            result = None
        if not isinstance(result, dict) or result.get("ds") != ds:
            raise self._lost(path, ds)
        return result

    def _lost(self, path: Path, ds: str) -> DataError:
        state = "damaged" if path.exists() else "gone"
        return DataError(
            f"{path} is {state}: run {self.command(ds)}, which writes it again, and then the same "
            "command as now"
        )
