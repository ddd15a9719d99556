"""The training of a model, upstream or downstream: one step, and the loop of steps.

What is trained, on what and by which loss is a subclass's to say: `Learner` for an upstream model, and
`jobs/training/downstream.py` for the arms of a comparison.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from jobs.training.average import Average
from jobs.training.by_name import Loading, Taken
from jobs.training.config import Optimization
from jobs.training.muon import Muon
from models.axes import axes_of
from models.batch import Batch

_MATRIX = 16  # least rows and columns of what Muon moves
T = TypeVar("T")


def choose_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Step(NamedTuple):
    """What a step has to go by, and what it was: total () float32, to call backward on; per_task
    (n_tasks,) float32, mean logloss; counts, positives (n_tasks,) int64, of the labels trained on."""

    total: Tensor
    per_task: Tensor
    counts: Tensor
    positives: Tensor


class Trainer(ABC, Generic[T]):
    """A model with its optimizers: the fused ones of its tables, Muon for matrices where the configuration
    says so, Adam for the rest.

    Args:
        model: with its first weights, and `tables` (`models.tables.Tables`).
        config: how it is optimized.
        device: where the model lives.
        rates: learning rates of single parameters, by name, where they are not those of `config`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Optimization,
        device: torch.device,
        *,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        fused = {id(p) for p in model.tables.parameters()}
        self.dense = {n: p for n, p in model.named_parameters() if id(p) not in fused}
        self.optimizers = self._optimizers(rates or {})
        self.average = Average(self.dense, config.average)
        self.steps = 0  # taken since the first day

    @abstractmethod
    def loss(self, item: T) -> Step:
        """The loss of one item of the training data, in a training step."""

    @abstractmethod
    def batch(self, item: T) -> Batch:
        """What an item holds."""

    def _optimizers(self, rates: Mapping[str, float]) -> dict[str, torch.optim.Optimizer]:
        """By name. Rows of a small embedding table are not a matrix in Muon's sense, and neither are biases
        by bucket and head, which are narrow."""
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        matrices: list[nn.Parameter] = []
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.dense.items():
            wide = parameter.ndim == 2 and min(parameter.shape) >= _MATRIX
            if self.config.muon and wide and id(parameter) not in tables:
                matrices.append(parameter)
            else:
                rate = rates.get(name, self.config.learning_rate)
                by_rate.setdefault(rate, []).append(parameter)
        groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        found: dict[str, torch.optim.Optimizer] = {"adam": torch.optim.Adam(groups, fused=True)}
        if matrices:
            found["muon"] = Muon(matrices, lr=self.config.learning_rate)
        return found

    def precision(self) -> AbstractContextManager[Any]:
        """The arithmetic of a forward pass."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()  # CPUs without AMX run bf16 an order of magnitude slower

    def step(self, item: T) -> Step:
        """One step of all optimizers."""
        if not self.model.training:  # going through all modules takes a twentieth of a small step
            self.model.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        found = self.loss(item)
        found.total.backward()
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(self.dense.values()), self.config.max_grad_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.steps += 1
        self.average.update(self.steps)
        return found

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

    def take(self, state: Mapping[str, Any]) -> Taken:
        """Take over weights, by the names of inputs and tasks, and the optimizers' state where it is given."""
        loading = Loading(self.model, state)
        taken = loading.weights()
        loading.optimizers(self.optimizers, self.dense)
        adam = self.optimizers["adam"].state.values()
        self.steps = max((int(slots["step"]) for slots in adam), default=0)
        self.average.load(loading.trained(self.dense))
        self.model.tables.load_optimizer_state(loading.tables())
        return taken

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the `state` of this very training."""
        taken = self.take(state)
        assert taken == Taken(), taken


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
    trainer: Trainer[T],
    items: Callable[[int, int], Iterable[T]],
    *,
    seed: int,
    restored: Mapping[str, Any] | None = None,
    checkpoint: Callable[[dict[str, Any]], None] | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train on every epoch's items, from the start or from where a run was interrupted.

    Args:
        trainer: with the state that training starts from.
        items: (epoch, items to skip) -> the rest of the epoch, in a fixed order.
        seed: of torch; a resumed run continues with the generators' recorded state instead.
        restored: what `checkpoint` was given last.
        checkpoint: called every `checkpoint_every_s` with all that a resumed run needs.
        report: called with it.
    """
    config = trainer.config
    done = Progress()
    torch.manual_seed(seed)
    if restored is not None:
        trainer.restore(restored["state"])
        done = Progress(**restored["progress"])
        done.resumed += 1
        torch.set_rng_state(restored["rng"])
        if trainer.device.type == "cuda":
            torch.cuda.set_rng_state(restored["cuda_rng"])
    trainer.average.train()
    started = last = time.monotonic()
    before = done.seconds
    with _flushing_denormals():
        while done.epoch < config.epochs:
            for item in items(done.epoch, done.batches):
                _count(done, trainer.batch(item), trainer.step(item))
                now = time.monotonic()
                if checkpoint is not None and now - last >= config.checkpoint_every_s:
                    done.seconds = before + now - started
                    checkpoint(_restorable(trainer, done))
                    last = now
                    if report is not None:
                        report(done)
            done.epoch, done.batches = done.epoch + 1, 0
    trainer.average.serve()
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


def _count(done: Progress, batch: Batch, step: Step) -> None:
    counts = step.counts.tolist()
    sums = (step.per_task.nan_to_num(0.0) * step.counts).tolist()
    if not done.labels:
        done.labels, done.loss_sum = [0] * len(counts), [0.0] * len(counts)
        done.positives = [0] * len(counts)
    positives = step.positives.tolist()
    done.positives = [a + b for a, b in zip(done.positives, positives, strict=True)]
    done.labels = [a + b for a, b in zip(done.labels, counts, strict=True)]
    done.loss_sum = [a + b for a, b in zip(done.loss_sum, sums, strict=True)]
    done.batches += 1
    done.steps += 1
    done.targets += batch.targets
    done.rows += batch.rows
    done.events += batch.events


def _restorable(trainer: Trainer[Any], done: Progress) -> dict[str, Any]:
    state = {
        "state": trainer.state(),
        "progress": {**done.__dict__},
        "rng": torch.get_rng_state(),
    }
    if trainer.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state
