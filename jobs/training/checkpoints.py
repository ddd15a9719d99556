"""Snapshots of upstream models on disk, and which of them is the champion of a day.

    <home>/models/<dataset>/<model>/<ds>/
        <snapshot id>/            atomic: written beside and renamed
            state.pt              weights and optimizers' state by name, and the names of their inputs
            snapshot.json         config, spec hash, inputs, parent, labels seen, hash of the weights
        progress.pt               of an interrupted training; gone when it is done
        champion.json             the snapshot that publishes ds and starts ds + 1
        evaluation.parquet, result.json    see jobs/train_upstream.py

A snapshot's id ends in a hash of its weights: the same training gives the same id, on whatever
Delta versions its inputs happen to lie. Snapshots are never removed, and overwritten only where what lies
there is damaged: the two files of state end in the SHA-256 of what comes before it, and `snapshot.json` holds
its own. Damage is an error that names the day to train again; of `progress.pt` it costs the progress.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.days import parse_day
from feature_store.errors import DataError, HeadwaterError
from jobs.paths import own

if TYPE_CHECKING:
    from torch import Tensor

STATE, SNAPSHOT, PROGRESS, CHAMPION = "state.pt", "snapshot.json", "progress.pt", "champion.json"
_SUM, _DIGEST_BYTES = "sha256", 32


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One trained state of a model.

    Args:
        id: `<model>-<ds>-<first digits of state_hash>`.
        model, ds: what was trained, on the labels of which day.
        parent: id of the snapshot that it started from; None: from the seed.
        run_hash: of everything that decided the training: config, parent, spec, inputs.
        state_hash: of the weights.
        config: as trained with, plain values.
        spec_hash: of the dataset's spec.
        inputs: {"<table>/<ds>": Delta version}.
        label_counts: task -> [positives, labels] of everything trained on so far, ancestors included.
        steps: batches trained on this day.
    """

    id: str
    model: str
    ds: str
    parent: str | None
    run_hash: str
    state_hash: str
    config: dict[str, Any]
    spec_hash: str
    inputs: dict[str, int]
    label_counts: dict[str, list[int]]
    steps: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def base_rates(self) -> dict[str, float]:
        """Task -> share of positives among the labels trained on; tasks with both answers only."""
        return {t: p / n for t, (p, n) in self.label_counts.items() if 0 < p < n}

    def trained_tasks(self) -> list[str]:
        """Tasks that it, or a snapshot before it, saw a label of."""
        return [t for t, (_, n) in self.label_counts.items() if n]


class Checkpoints:
    """The snapshots of one model.

    Args:
        root: `<home>/models/<dataset>/<model>`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def day(self, ds: str) -> Path:
        """The folder of one day."""
        return self.root / ds

    def path(self, snapshot: str) -> Path:
        """The folder of the snapshot with this id.

        Raises:
            DataError: there is none.
        """
        for found in self.root.glob(f"*/{snapshot}"):
            return found
        raise DataError(
            f"snapshot is {snapshot!r}: {self.root} has none of that id; train its day again"
        )

    def get(self, snapshot: str) -> Snapshot:
        """What is known about the snapshot with this id.

        Raises:
            DataError: there is none, or its record is damaged.
        """
        path = self.path(snapshot)
        found = _read_record(path / SNAPSHOT)
        if found is None:
            raise self._damaged(f"snapshot {snapshot}", path.parent.name, path / SNAPSHOT)
        return found

    def snapshots(self, ds: str) -> list[Snapshot]:
        """Every snapshot that was ever trained on `ds` and whose record can be read, by id."""
        found = map(_read_record, sorted(self.day(ds).glob(f"*/{SNAPSHOT}")))
        return [snapshot for snapshot in found if snapshot is not None]

    def trained(self, ds: str, run_hash: str) -> Snapshot | None:
        """The snapshot that this very training gave before, if it was completed and is not damaged."""
        mine = (s for s in self.snapshots(ds) if s.run_hash == run_hash)
        return next((s for s in mine if is_whole(self.day(ds) / s.id / STATE)), None)

    def save(self, snapshot: Snapshot, state: Mapping[str, Any]) -> Path:
        """Write a snapshot; whole weights that are there already are kept, and get the new record."""
        day = self.day(snapshot.ds)
        day.mkdir(parents=True, exist_ok=True)
        final = day / snapshot.id
        if is_whole(final / STATE):
            write_atomically(final / SNAPSHOT, _record(snapshot))
            return final
        staging = day / f".{snapshot.id}-{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        try:
            write_state(staging / STATE, state)
            (staging / SNAPSHOT).write_bytes(_record(snapshot))
            for name in (STATE, SNAPSHOT):
                _sync(staging / name)
            try:
                os.rename(staging, final)
            except OSError:  # damaged; or the same training, run twice at once, was faster
                if not final.is_dir():
                    raise
                for name in (STATE, SNAPSHOT):
                    os.replace(staging / name, final / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return final

    def load(self, snapshot: str) -> dict[str, Any]:
        """The state of a snapshot, on the CPU.

        Raises:
            DataError: there is no such snapshot, or its state is damaged.
        """
        path = self.path(snapshot)
        state = read_state(path / STATE)
        if state is None:
            raise self._damaged(f"snapshot {snapshot}", path.parent.name, path / STATE)
        return state

    def command(self, ds: str) -> str:
        """What trains `ds`."""
        dataset, model = self.root.parts[-2:]
        return f"python -m jobs train_upstream --dataset {dataset} --model {model} --ds {ds}"

    def _damaged(self, what: str, ds: str, path: Path) -> DataError:
        return DataError(
            f"{what} is damaged: {path} is not what the training of {ds} wrote; run "
            f"{self.command(ds)}, which gives the same again"
        )

    # ---- training that was interrupted

    def save_progress(self, ds: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a training that goes on; replaces the one before in one step."""
        day = self.day(ds)
        day.mkdir(parents=True, exist_ok=True)
        with replacing(day / PROGRESS) as staging:
            write_state(staging, state)

    def load_progress(self, ds: str, run_hash: str) -> dict[str, Any] | None:
        """The state that this very training was interrupted in, if it was.

        Where it is damaged the training has to start again, and a line says so.
        """
        path = self.day(ds) / PROGRESS
        if not path.exists():
            return None
        state = read_state(path)
        if state is None:
            print(own(f"{path} is damaged: the training of {ds} starts again"), flush=True)
            return None
        return state if state["run_hash"] == run_hash else None

    def clear_progress(self, ds: str) -> None:
        """Training is done."""
        (self.day(ds) / PROGRESS).unlink(missing_ok=True)

    # ---- champions

    def set_champion(self, ds: str, snapshot: str, **why: Any) -> None:
        """Say which snapshot publishes `ds` and starts `ds + 1`."""
        record = {"snapshot": snapshot, "ds": ds, **why}
        self.day(ds).mkdir(parents=True, exist_ok=True)
        write_atomically(self.day(ds) / CHAMPION, json.dumps(record, indent=1).encode())

    def champion_record(self, ds: str) -> dict[str, Any] | None:
        """What `set_champion` said of `ds`.

        Raises:
            DataError: it cannot be read.
        """
        path = self.day(ds) / CHAMPION
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_bytes())
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("snapshot"), str):
            raise self._damaged(f"champion of {self.root.name} on {ds}", ds, path)
        return record

    def champion(self, ds: str) -> Snapshot | None:
        """The champion of exactly `ds`."""
        record = self.champion_record(ds)
        return None if record is None else self.get(record["snapshot"])

    def decided_from(self, ds: str) -> tuple[str, str]:
        """Definition and identity of the tables by which the champion of `ds` was chosen; "" where none
        was."""
        record = self.champion_record(ds) or {}
        return record.get("definition", ""), record.get("identity", "")

    def champion_days(self) -> list[str]:
        """Days that have a champion, ascending."""
        return sorted(p.parent.name for p in self.root.glob(f"*/{CHAMPION}"))

    def newest_champion(self, ds: str) -> Snapshot | None:
        """The champion of the newest day up to `ds`."""
        days = [d for d in self.champion_days() if d <= ds]
        return self.champion(days[-1]) if days else None

    def require_champion(self, ds: str) -> Snapshot:
        """The champion of `ds`.

        Raises:
            HeadwaterError: that day was not trained.
        """
        parse_day(ds)
        found = self.champion(ds)
        if found is None:
            days = self.champion_days()
            have = f"{days[0]} to {days[-1]} have one" if days else "no day has one"
            raise HeadwaterError(
                f"champion of {self.root.name} on {ds} is missing ({have}): run {self.command(ds)}"
            )
        return found


def run_hash(
    *,
    model: str,
    ds: str,
    config: Mapping[str, Any],
    spec: str,
    parent: str | None,
    inputs: Mapping[str, str],
) -> str:
    """16 hex digits that change with anything that decides a training; `inputs` by their identity, as the
    same partition may lie at several versions."""
    parts = [model, ds, config, spec, parent, dict(inputs)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def state_hash(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of names, shapes, types and bytes of `state`."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()[:16]


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """A file of tensors and plain values that ends in the SHA-256 of what comes before."""
    import torch

    with path.open("wb") as file:  # and not by name: a full disk is an OSError then
        torch.save(dict(state), file)
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digest)


def is_whole(path: Path) -> bool:
    """Whether `path` is there and has the bytes that `write_state` wrote."""
    if not path.is_file():
        return False
    size = path.stat().st_size - _DIGEST_BYTES
    if size <= 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        return file.read() == _digest(path, size)


def read_state(path: Path) -> dict[str, Any] | None:
    """What `write_state` was given, on the CPU; None where the file is not whole."""
    import torch

    if not is_whole(path):
        return None
    return torch.load(path, map_location="cpu", weights_only=True)  # and does not mind the end


def _digest(path: Path, size: int) -> bytes:
    """SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.digest()


def _record(snapshot: Snapshot) -> bytes:
    """The content of `snapshot.json`."""
    values = asdict(snapshot)
    return json.dumps(values | {_SUM: _sum(values)}, indent=1, sort_keys=True).encode()


def _read_record(path: Path) -> Snapshot | None:
    """The snapshot that `_record` wrote; None where it is not whole."""
    try:
        values = json.loads(path.read_bytes())
        given = values.pop(_SUM)
        return Snapshot(**values) if given == _sum(values) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` in one step at the end; where something fails, nothing does."""
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield staging
        _sync(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    with replacing(path) as staging:
        staging.write_bytes(data)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
