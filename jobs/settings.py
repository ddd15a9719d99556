"""Where a run reads and writes: environment variables, read once at the entry and passed on from there."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from feature_store.errors import SpecError
from jobs.paths import check_delta, plain

REPOSITORY = Path(__file__).resolve().parent.parent


class EngineChoice(StrEnum):
    """Which local engine `jobs/spark.py` starts where no `SPARK_REMOTE` is given."""

    AUTO = "auto"  # Apache Spark where Java 17+ and the Delta JARs are there, Sail otherwise
    SPARK = "spark"
    SAIL = "sail"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything of the environment that a job depends on.

    Args:
        home: `HEADWATER_HOME`, the folder that holds everything a run writes (`<repository>/var`),
            as a path that every library takes; see `jobs/paths.py`.
        lake_root: `HEADWATER_LAKE`, the folder or URI of the lake (`<home>/lake`).
        mlflow_uri: `MLFLOW_TRACKING_URI` (an SQLite file under home).
        source: `HEADWATER_SOURCE`, the folder of raw logs; None where the source needs none.
        spark_remote: `SPARK_REMOTE`, the address of a Spark Connect cluster to attach to.
        engine: `HEADWATER_ENGINE`, which engine to start where there is no cluster.
        spark_memory: `HEADWATER_SPARK_MEMORY`, heap of the local Apache Spark server.
        jars: folder of the Delta JARs, filled at set-up.
    """

    home: Path
    lake_root: str
    mlflow_uri: str
    source: Path | None = None
    spark_remote: str | None = None
    engine: EngineChoice = EngineChoice.AUTO
    spark_memory: str = "3g"
    jars: Path = REPOSITORY / ".jars"

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """The settings that `env` (default: the process's environment) gives; an empty value is absent.

        Raises:
            SpecError: `HEADWATER_ENGINE` names no engine, a folder's name leads nowhere, or it cannot
                hold Delta tables.
        """
        values = {k: v for k, v in (os.environ if env is None else env).items() if v}
        remote = values.get("SPARK_REMOTE")

        def folder(setting: str, path: str, *, delta: bool) -> Path:
            found = _resolved(setting, path)
            if delta:
                check_delta(setting, found)
            return found if remote else plain(found)  # a cluster knows no link of this machine

        lake = values.get("HEADWATER_LAKE", "")
        var = values.get("HEADWATER_HOME", str(REPOSITORY / "var"))
        home = folder("HEADWATER_HOME", var, delta=not lake)
        engine = values.get("HEADWATER_ENGINE", EngineChoice.AUTO).lower()
        if engine not in set(EngineChoice):
            raise SpecError(f"HEADWATER_ENGINE is {engine!r}: use {', '.join(EngineChoice)}")
        if "://" not in lake:
            lake = str(folder("HEADWATER_LAKE", lake, delta=True) if lake else home / "lake")
        source = values.get("HEADWATER_SOURCE")
        return cls(
            home=home,
            lake_root=lake,
            mlflow_uri=values.get("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow/mlflow.db"),
            source=_resolved("HEADWATER_SOURCE", source) if source else None,
            spark_remote=remote,
            engine=EngineChoice(engine),
            spark_memory=values.get("HEADWATER_SPARK_MEMORY", "3g"),
        )

    def make_folders(self) -> None:
        """Make home and a local lake where they are not there, and see that both can be written.

        Raises:
            SpecError: one of them is a file or cannot be written.
        """
        folders = {"HEADWATER_HOME": self.home}
        if "://" not in self.lake_root:
            folders["HEADWATER_LAKE"] = Path(self.lake_root)
        for name, folder in folders.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise SpecError(
                    f"{name} is {folder}, which is no folder that can be written "
                    f"({error.strerror}): name another, or mend its rights"
                ) from None

    @property
    def mlflow_artifacts(self) -> Path:
        """Where MLflow keeps plots and files."""
        return self.home / "mlflow" / "artifacts"

    @property
    def airflow_home(self) -> Path:
        """Airflow's database, configuration and logs."""
        return self.home / "airflow"

    @property
    def spark_dir(self) -> Path:
        """Scratch, log and state of the local engine."""
        return self.home / "spark"

    def snapshot_dir(self, dataset: str, model: str, ds: str) -> Path:
        """Checkpoint of `model` after training on `ds`."""
        return self.home / "models" / dataset / model / ds

    def downstream_dir(self, dataset: str, task: str) -> Path:
        """What the downstream models of `task` predicted and how they scored, a folder for each day."""
        return self.home / "downstream" / dataset / task

    def report_dir(self, dataset: str) -> Path:
        """The report's page, `index.html`, and its figures."""
        return self.home / "report" / dataset

    def report_json(self, dataset: str) -> Path:
        """The report's figures."""
        return self.report_dir(dataset) / "report.json"

    def quality_dir(self, dataset: str) -> Path:
        """Great Expectations' Data Docs."""
        return self.home / "quality" / dataset


def _resolved(name: str, value: str) -> Path:
    try:
        return Path(value).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, an unknown ~user
        raise SpecError(
            f"{name} is {value!r}: {str(error).rstrip('.')}; name another folder"
        ) from None
