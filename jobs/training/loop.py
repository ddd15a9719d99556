"""Training and scoring of an upstream model over batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from feature_store.columns import NO_LABEL
from feature_store.errors import SpecError
from feature_store.spec import Dataset, IdType, Kind
from jobs.training.average import Average
from jobs.training.by_name import Loading, Taken
from jobs.training.config import Shift
from jobs.training.ids import int64_ids
from jobs.training.loader import Limits, cuts
from jobs.training.muon import Muon
from jobs.training.presets import Preset
from jobs.training.rows import Rows
from models.axes import axes_of
from models.batch import Batch
from models.loss import distillation, embedding_shift, multi_task_loss
from models.outputs import Outputs

_MATRIX = 16  # least rows and columns of what Muon moves


def choose_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def domain_id(dataset: Dataset, value: int | str) -> int:
    """`value` of the dataset's domain feature as batches hold it: a string is hashed as ids are.

    Raises:
        SpecError: the dataset has no domain feature, or one of other values.
    """
    feature = next((c for c in dataset.context_features if c.name == dataset.domain), None)
    if feature is None or feature.kind is not Kind.CATEGORICAL:
        raise SpecError(
            f"TrainingConfig.domain is {value!r}: Dataset({dataset.name}).domain is {dataset.domain!r}, "
            "name a categorical context feature there"
        )
    if isinstance(value, str) != (feature.id_type is IdType.STRING):
        raise SpecError(
            f"TrainingConfig.domain is {value!r}: ids of {feature.name} are {feature.id_type}; give one"
        )
    return int(int64_ids(pa.array([value]))[0])


class Learner:
    """A model with its optimizers: the fused ones of its tables, Muon for matrices where the preset
    says so, Adam for the rest.

    Args:
        dataset: the spec.
        preset: which model, and how it is trained. Its first weights come from torch's generator.
        device: where the model lives.
        state: that it takes over, by the names of inputs and tasks; what `state` lacks keeps its first
            weights, and `taken` names it.

    Raises:
        SpecError: the preset trains on a domain that the dataset cannot have.
    """

    def __init__(
        self,
        dataset: Dataset,
        preset: Preset,
        device: torch.device,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.preset = preset
        self.config = preset.training
        self.device = device
        domain = self.config.domain
        self.domain = None if domain is None else domain_id(dataset, domain)
        self.model = model = preset.build(dataset, device)
        weights = dict(self.config.task_weights)
        self.task_weights = torch.tensor([weights.get(t.name, 1.0) for t in dataset.tasks]).to(
            device
        )
        fused = {id(p) for p in model.tables.parameters()}
        self.dense = {n: p for n, p in model.named_parameters() if id(p) not in fused}
        self.optimizers = self._optimizers()
        self.average = Average(self.dense, self.config.average)
        self.parent: nn.Module | None = None
        self.parent_knows = torch.zeros(len(dataset.tasks), dtype=torch.bool, device=device)
        self.taken = Taken() if state is None else self._take(state)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By name. Rows of a small embedding table are not a matrix in Muon's sense, and neither are biases
        by bucket and head, which are narrow."""
        rate = self.config.learning_rate
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for parameter in self.dense.values():
            wide = parameter.ndim == 2 and min(parameter.shape) >= _MATRIX
            of_muon = self.config.muon and wide and id(parameter) not in tables
            (matrices if of_muon else rest).append(parameter)
        found: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.Adam(rest, lr=rate, fused=True)
        }
        if matrices:
            found["muon"] = Muon(matrices, lr=rate)
        return found

    def keep_parent(self, tasks: Collection[str]) -> None:
        """The weights as they are now are the parent's, for the rest of the day's training.

        Without a shift term nothing is kept.

        Args:
            tasks: that it was trained on. Of the others its predictions are those of first weights, and
                distillation leaves them out.
        """
        if self.config.shift == Shift.NONE:
            return
        # not a deep copy: the fused tables cannot be copied, only built
        parent = self.preset.build(self.dataset, self.device).eval().requires_grad_(False)
        parent.load_state_dict(self.model.state_dict())
        self.parent = parent
        knows = [task.name in tasks for task in self.dataset.tasks]
        self.parent_knows = torch.tensor(knows, device=self.device)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()  # CPUs without AMX run bf16 an order of magnitude slower

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all optimizers.

        Returns:
            per_task (n_tasks,) float32, mean logloss; counts and positives (n_tasks,) int64, of the
            labels trained on.
        """
        self.model.train()
        batch = batch.to(self.device, non_blocking=True)
        labels = self._labels(batch)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        with self._precision():
            found = self.model(batch)
        logits = found.logits if found.members is None else found.members
        loss = multi_task_loss(logits, labels, self.task_weights)
        total = loss.total
        if found.user_logits is not None:
            total = total + multi_task_loss(found.user_logits, labels, self.task_weights).total
        if self.parent is not None:
            shift = self._shift(self.parent, batch, labels, found)
            total = total + self.config.shift_weight * shift
        total.backward()
        nn.utils.clip_grad_norm_(list(self.dense.values()), self.config.max_grad_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.average.update(self.steps)
        positives = (labels == 1).sum(0)
        return {"per_task": loss.per_task, "counts": loss.counts, "positives": positives}

    def _labels(self, batch: Batch) -> Tensor:
        """(T, n_tasks): the labels, but for those of other domains than the one trained on."""
        if self.domain is None:
            return batch.labels
        mine = batch.context_ids[str(self.dataset.domain)] == self.domain
        return torch.where(mine[:, None], batch.labels, NO_LABEL)

    def _shift(self, parent: nn.Module, batch: Batch, labels: Tensor, found: Outputs) -> Tensor:
        """() float32: how far `found` is from what the parent says of the batch."""
        if self.config.shift == Shift.REGULARISE:
            with torch.no_grad(), self._precision():
                users = parent.user_embeddings(batch)
            return embedding_shift(found.users, users)
        with torch.no_grad(), self._precision():
            before = parent(batch)
        labels = torch.where(self.parent_knows, labels, NO_LABEL)
        return distillation(found, before, labels, self.task_weights)

    @torch.no_grad()
    def probabilities(self, batch: Batch) -> Tensor:
        """(T, n_tasks) float32 on the CPU."""
        self.model.eval()
        with self._precision():
            found = self.model(batch.to(self.device))
        return torch.sigmoid(found.logits.float()).cpu()

    @torch.no_grad()
    def user_embeddings(self, batch: Batch, at: int | None = None) -> Tensor:
        """(R, K, D) float32 on the CPU: what served the day of the rows' targets; or, with `at`, of users as
        they are at that instant (UTC microseconds), by which all of their events were available."""
        self.model.eval()
        with self._precision():
            batch = batch.to(self.device)
            instants = None if at is None else batch.event_offsets.new_full((batch.rows,), at)
            return self.model.user_embeddings(batch, instants).float().cpu()

    @property
    def steps(self) -> int:
        """Taken by Adam since the first day."""
        steps = (int(slots["step"]) for slots in self.optimizers["adam"].state.values())
        return max(steps, default=0)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, averaged; views, not copies."""
        return {**self.model.state_dict(), **self.average.served()}

    def state(self) -> dict[str, Any]:
        """Weights, averaged and as trained, and all optimizers' state, by name."""
        slots = {
            kind: {n: optimizer.state[p] for n, p in self.dense.items() if p in optimizer.state}
            for kind, optimizer in self.optimizers.items()
        }
        return {
            "weights": self.weights(),
            "trained": self.average.trained(),
            **slots,
            "tables": dict(self.model.tables.optimizer_state()),
            "axes": axes_of(self.model),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the `state` of this very training."""
        taken = self._take(state)
        assert taken == Taken(), taken

    def _take(self, state: Mapping[str, Any]) -> Taken:
        """Take over weights, and the optimizers' state where it is given."""
        loading = Loading(self.model, state)
        taken = loading.weights()
        loading.optimizers(self.optimizers, self.dense)
        self.average.load(loading.trained(self.dense))
        self.model.tables.load_optimizer_state(loading.tables())
        return taken


@dataclass(kw_only=True)
class Progress:
    """What a training has done so far; kept in `progress.pt`."""

    epoch: int = 0
    batches: int = 0  # of this epoch
    steps: int = 0
    targets: int = 0
    rows: int = 0
    events: int = 0
    seconds: float = 0.0
    loss_sum: list[float] = field(default_factory=list)  # per task: sum of logloss over labels
    labels: list[int] = field(default_factory=list)
    positives: list[int] = field(default_factory=list)
    resumed: int = 0  # times


def train(
    learner: Learner,
    batches: Callable[[int, int], Iterable[Batch]],
    *,
    seed: int,
    restored: Mapping[str, Any] | None = None,
    checkpoint: Callable[[dict[str, Any]], None] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train on every epoch's batches, from the start or from where a run was interrupted.

    Args:
        learner: with the parent's state loaded, and kept where there is a parent.
        batches: (epoch, batches to skip) -> the rest of the epoch, in a fixed order.
        seed: of torch; a resumed run continues with the generators' recorded state instead.
        restored: what `checkpoint` was given last.
        checkpoint: called every `checkpoint_every_s` with all that a resumed run needs.
        report: called with it.
    """
    config = learner.config
    done = Progress()
    torch.manual_seed(seed)
    if restored is not None:
        learner.restore(restored["state"])
        done = Progress(**restored["progress"])
        done.resumed += 1
        torch.set_rng_state(restored["rng"])
        if learner.device.type == "cuda":
            torch.cuda.set_rng_state(restored["cuda_rng"])
    learner.average.train()
    started = last = time.monotonic()
    before = done.seconds
    with _flushing_denormals():
        while done.epoch < config.epochs:
            for batch in batches(done.epoch, done.batches):
                found = learner.step(batch)
                _count(done, batch, found)
                now = time.monotonic()
                if checkpoint is not None and now - last >= config.checkpoint_every_s:
                    done.seconds = before + now - started
                    checkpoint(_restorable(learner, done))
                    last = now
                    if report is not None:
                        report(done)
            done.epoch, done.batches = done.epoch + 1, 0
    learner.average.serve()
    done.seconds = before + time.monotonic() - started
    return done


@contextmanager
def _flushing_denormals() -> Iterator[None]:
    """The momentum of a unit that nothing excites any more shrinks for ever, and a CPU is many times
    slower with numbers of 1e-39 than with zeros. For the training alone: others may need them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _count(done: Progress, batch: Batch, found: Mapping[str, Tensor]) -> None:
    counts = found["counts"].tolist()
    sums = (found["per_task"].nan_to_num(0.0) * found["counts"]).tolist()
    if not done.labels:
        done.labels, done.loss_sum = [0] * len(counts), [0.0] * len(counts)
        done.positives = [0] * len(counts)
    positives = found["positives"].tolist()
    done.positives = [a + b for a, b in zip(done.positives, positives, strict=True)]
    done.labels = [a + b for a, b in zip(done.labels, counts, strict=True)]
    done.loss_sum = [a + b for a, b in zip(done.loss_sum, sums, strict=True)]
    done.batches += 1
    done.steps += 1
    done.targets += batch.targets
    done.rows += batch.rows
    done.events += batch.events


def _restorable(learner: Learner, done: Progress) -> dict[str, Any]:
    state = {
        "state": learner.state(),
        "progress": {**done.__dict__},
        "rng": torch.get_rng_state(),
    }
    if learner.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Predictions where there is a label, one entry per (target, task): arrays of length n."""

    user_id: np.ndarray  # int64 (strings hashed)
    stored_user_id: np.ndarray  # the source's, int64 or str
    target_id: np.ndarray  # the source's, int64 or str
    task: np.ndarray  # int64, index into dataset.tasks
    label: np.ndarray  # int64, 0 or 1
    prediction: np.ndarray  # float64
    domain: np.ndarray  # int64; -1 where the dataset has none

    def __len__(self) -> int:
        return len(self.label)

    def where(self, mask: np.ndarray) -> Scored:
        """Those entries."""
        return Scored(**{k: v[mask] for k, v in self.__dict__.items()})


def concat(parts: Iterable[Scored]) -> Scored:
    """All of them in one."""
    parts = list(parts)
    empty = {k: np.empty(0, np.float64 if k == "prediction" else np.int64) for k in _SCORED_FIELDS}
    if not parts:
        return Scored(**empty)
    return Scored(**{k: np.concatenate([getattr(p, k) for p in parts]) for k in _SCORED_FIELDS})


_SCORED_FIELDS = tuple(Scored.__annotations__)


def score(dataset: Dataset, learner: Learner, decoded: Iterable[Rows], limits: Limits) -> Scored:
    """Predictions for every label of the rows.

    Raises:
        FloatingPointError: a prediction is not a number.
    """
    return finite(
        concat(
            labelled_predictions(dataset, rows, lo, hi, batch, learner.probabilities(batch).numpy())
            for rows in decoded
            for lo, hi in cuts(rows, limits)
            for batch in [rows.batch(lo, hi)]
        )
    )


def finite(scored: Scored) -> Scored:
    """The same.

    Raises:
        FloatingPointError: a prediction is not a number.
    """
    if not np.isfinite(scored.prediction).all():
        raise FloatingPointError("a prediction is not a number: the model has diverged")
    return scored


def labelled_predictions(
    dataset: Dataset, rows: Rows, lo: int, hi: int, batch: Batch, probabilities: np.ndarray
) -> Scored:
    """`probabilities` (T, n_tasks) of rows `lo` to `hi`, where there is a label."""
    labels = batch.labels.numpy()
    target, task = np.nonzero(labels != NO_LABEL)
    chosen = probabilities[target, task].astype(np.float64)
    at = rows.target_offsets[lo] + target
    row = np.searchsorted(rows.target_offsets, at, side="right") - 1  # a batch may have other rows
    domain = np.full(batch.targets, -1, np.int64)
    if dataset.domain is not None and dataset.domain in batch.context_ids:
        domain = batch.context_ids[dataset.domain].numpy()
    return Scored(
        user_id=rows.user_id[row],
        stored_user_id=_stored(rows.stored_user_id, row),
        target_id=_stored(rows.target_id, at),
        task=task,
        label=labels[target, task].astype(np.int64),
        prediction=chosen,
        domain=domain[target],
    )


def _stored(ids: pa.Array, at: np.ndarray) -> np.ndarray:
    return ids.take(pa.array(at)).to_numpy(zero_copy_only=False)
