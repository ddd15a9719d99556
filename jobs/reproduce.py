"""`make reproduce RUN=<id>`: train a recorded run again and compare the weights bit by bit.

Reads the partitions at the recorded Delta versions and starts from the recorded parent snapshot,
with the recorded configuration. Nothing of the run, or of the lake, is changed. On another machine
or torch, sums may round otherwise, and the answer is an honest no.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow.exceptions import MlflowException

from feature_store import datasets
from feature_store.errors import DataError
from feature_store.spec import Dataset
from jobs import failures
from jobs.context import JobContext
from jobs.settings import Settings
from jobs.training import tracking
from jobs.training.checkpoints import Checkpoints
from jobs.training.loader import label_days, labelled_day
from jobs.training.upstream_day import UpstreamDay
from jobs.training.whole import recorded_preset


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """The recorded and the new hash of the weights."""

    snapshot: str
    recorded: str
    found: str

    @property
    def same(self) -> bool:
        """Whether every weight has the same bits."""
        return self.recorded == self.found


def reproduce(settings: Settings, run_id: str, *, dataset: Dataset | None = None) -> Reproduced:
    """Train MLflow run `run_id` again.

    Args:
        dataset: the spec; default: the one that the run's tag names.

    Raises:
        DataError: no such run; it is no upstream run; the spec has changed; or a partition can no
            longer be read at its version (a deletion of a person's data does that on purpose).
    """
    try:
        tags = tracking.client(settings).get_run(run_id).data.tags
    except MlflowException:
        raise DataError(f"run is {run_id!r}: {settings.mlflow_uri} has none of that id") from None
    if "snapshot" not in tags:
        raise DataError(
            f"run is {run_id!r}: it trained no upstream model; name a run of <dataset>/upstream/<model>"
        )
    spec = dataset or datasets.get(tags["dataset"])
    root = settings.snapshot_dir(spec.name, tags["model"], tags["ds"]).parent
    recorded = Checkpoints(root).get(tags["snapshot"])
    if recorded.spec_hash != spec.hash:
        raise DataError(
            f"spec of {spec.name} is {spec.hash}, the run's was {recorded.spec_hash}: check out code "
            f"version {tags.get('code_version', '?')}"
        )
    context = JobContext(dataset=spec, ds=recorded.ds, settings=settings, model=recorded.model)
    also = [ds for ds in label_days(recorded.inputs) if ds != recorded.ds]
    day = labelled_day(context.lake, spec, recorded.ds, also=also, inputs=recorded.inputs)
    preset = recorded_preset(recorded)
    with tempfile.TemporaryDirectory(dir=_scratch(settings)) as scratch:
        again = UpstreamDay(
            context=replace(context, settings=replace(settings, home=Path(scratch))),
            model=recorded.model,
            preset=preset,
            day=day,
            parents=Checkpoints(root),
        )
        parent = Checkpoints(root).get(recorded.parent) if recorded.parent else None
        found, _ = again.train(parent)
    return Reproduced(snapshot=recorded.id, recorded=recorded.state_hash, found=found.state_hash)


def _scratch(settings: Settings) -> Path:
    folder = settings.home / "models" / ".reproduce"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.reproduce", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", help="id of an MLflow run of an upstream model")
    run, settings = parser.parse_args().run, None
    try:
        settings = Settings.from_env()
        result = reproduce(settings, run)
    except Exception as error:
        sys.exit(failures.report(error, settings))
    print(f"{result.snapshot}: recorded {result.recorded}, trained again {result.found}")
    print("identical to the bit" if result.same else "NOT identical")
    sys.exit(0 if result.same else 1)


if __name__ == "__main__":
    main()
