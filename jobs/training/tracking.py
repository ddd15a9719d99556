"""MLflow: where people review experiments.

One experiment per `<dataset>/upstream/<model>` and `<dataset>/downstream/<task>`, one run per day
and configuration: a retry finds its run by a tag and goes on in it. A run names the Delta version
of every partition that it read. The registered model `<dataset>.<model>` has a version per
snapshot, which is a reference to the checkpoint and not a copy of it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.delta_dataset_source import DeltaDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from jobs.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from feature_store.lake import Lake

RUN_KEY = "headwater.key"
SNAPSHOT_TAG = "snapshot"
CHAMPION_ALIAS, CANDIDATE_ALIAS = "champion", "candidate"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # its pages show runs, not traces
_MAX_PARAM = 6000  # characters of a parameter's value that MLflow stores
_BATCH = 100  # parameters, or tags, of one `log_batch`


def client(settings: Settings) -> MlflowClient:
    """A client of the tracking store, which is created on first use.

    Two tasks may come first at once: a lock keeps them from creating the same database.
    """
    for name in ("alembic", "mlflow"):  # a line per table that is created
        logging.getLogger(name).setLevel(logging.WARNING)
    # the traceback of what is raised all the same
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    sqlite = settings.mlflow_uri.startswith("sqlite:///")
    lock: Any = nullcontext()
    if sqlite:
        folder = Path(settings.mlflow_uri.removeprefix("sqlite:///")).parent
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".create.lock")
    with lock:
        # it would ask the engine where the registry is, were it not told
        found = MlflowClient(settings.mlflow_uri, registry_uri=settings.mlflow_uri)
        found.search_experiments(max_results=1)
    return found


def experiment_id(mlflow: MlflowClient, settings: Settings, name: str) -> str:
    """The experiment called `name`, created where there is none, by us or by another task."""
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        local = settings.mlflow_uri.startswith("sqlite:///")
        location = (settings.mlflow_artifacts / name).as_uri() if local else None
        try:
            return mlflow.create_experiment(name, artifact_location=location, tags=_KIND)
        except MlflowException as error:
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                raise error
    return found.experiment_id


class Run:
    """One MLflow run, found again by its key; a context manager that ends it.

    Args:
        settings: where the store is.
        experiment: its name.
        name: the run's name, for people.
        key: what makes it the same run on a retry.
        tags: searched by, and shown.
        mlflow: a client, where there is one already.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        experiment: str,
        name: str,
        key: str,
        tags: Mapping[str, str],
        mlflow: MlflowClient | None = None,
    ) -> None:
        self.client = mlflow or client(settings)
        self.experiment = experiment_id(self.client, settings, experiment)
        found = self.client.search_runs(
            [self.experiment], f"tags.`{RUN_KEY}` = '{key}'", max_results=1
        )
        if found:
            run = found[0]
            self.client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self.client.create_run(
                self.experiment, tags={**tags, RUN_KEY: key}, run_name=name
            )
        self.id: str = run.info.run_id
        self._params = dict(run.data.params)
        self._inputs = {d.dataset.name for d in run.inputs.dataset_inputs} if run.inputs else set()
        self.tags({k: v for k, v in tags.items() if run.data.tags.get(k) != v})

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.client.set_terminated(self.id, "FINISHED")
            return
        with suppress(MlflowException):  # `error` is what matters
            self.client.set_terminated(self.id, "FAILED")

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        rows = [RunTag(k, str(v)) for k, v in tags.items()]
        for i in range(0, len(rows), _BATCH):
            self.client.log_batch(self.id, tags=rows[i : i + _BATCH])

    def params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; nested ones by dotted name. They cannot change: known ones are skipped."""
        flat = {k: str(v)[:_MAX_PARAM] for k, v in flatten(params).items()}
        rows = [Param(k, v) for k, v in flat.items() if k not in self._params]
        for i in range(0, len(rows), _BATCH):
            self.client.log_batch(self.id, params=rows[i : i + _BATCH])
        self._params |= flat

    def metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log what is a finite number; NaN and infinity break the pages of a run."""
        now = time.time_ns() // 1_000_000
        rows = [
            Metric(k, float(v), now, step)
            for k, v in metrics.items()
            if v is not None and math.isfinite(v)
        ]
        for i in range(0, len(rows), 1000):
            self.client.log_batch(self.id, metrics=rows[i : i + 1000])

    def lineage(self, lake: Lake, inputs: Mapping[str, int], context: str) -> None:
        """Name the Delta version of every partition that the run read.

        Args:
            inputs: {"<table>/<ds>" or "<table>/<model>/<ds>": version}.
            context: what they were read for, say `training`.
        """
        rows = []
        for pin, version in inputs.items():
            if pin in self._inputs:
                continue
            source = DeltaDatasetSource(
                path=lake.uri(pin.split("/")[0]), delta_table_version=version
            )
            dataset = MetaDataset(source, name=pin, digest=f"v{version}")
            tags = [InputTag("mlflow.data.context", context)]
            rows.append(DatasetInput(dataset=dataset._to_mlflow_entity(), tags=tags))
        if rows:
            self.client.log_inputs(self.id, rows)
        self.tags({f"input.{pin}": str(version) for pin, version in inputs.items()})

    def text(self, text: str, path: str) -> None:
        """Keep a text file."""
        self.client.log_text(self.id, text, path)

    def figure(self, figure: Figure, path: str) -> None:
        """Keep a plot."""
        self.client.log_figure(self.id, figure, path)


def register(
    mlflow: MlflowClient,
    name: str,
    *,
    snapshot: str,
    path: Path,
    run_id: str,
    tags: Mapping[str, str],
) -> str:
    """The version of registered model `name` that stands for `snapshot`, made where there is none."""
    found = version_of(mlflow, name, snapshot)
    if found is not None:
        return found
    try:
        mlflow.create_registered_model(name)
    except MlflowException:
        mlflow.get_registered_model(name)  # there already; anything else raises again here
    version = mlflow.create_model_version(
        name, source=path.as_uri(), run_id=run_id, tags={**tags, SNAPSHOT_TAG: snapshot}
    )
    return str(version.version)


def version_of(mlflow: MlflowClient, name: str, snapshot: str) -> str | None:
    """The registered version of `snapshot`, if there is one."""
    rows = mlflow.search_model_versions(f"name = '{name}' and tags.{SNAPSHOT_TAG} = '{snapshot}'")
    return str(rows[0].version) if rows else None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
