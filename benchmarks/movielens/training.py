"""Training, ranking and the state of a run on disk, which is all that it needs to go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.movielens.data import VALIDATION, Batch, Log
from benchmarks.movielens.model import ModelConfig, Recommender, catalogue_loss, refuse
from feature_store.errors import HeadwaterError
from jobs.training.checkpoints import replacing

_CHUNK = {"cpu": 256, "cuda": 8192}
_EVALUATED = 256  # users at a time
SELECTED_BY = "ndcg@10"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Args:
    model: what is trained.
    epochs: at most; the learning rate falls to zero at their end, by a cosine.
    users: of a batch, a window of each; an epoch has a window of every user.
    rate: highest learning rate, reached after the first epoch.
    decay: weight decay.
    average: of the weights that are evaluated, an exponential moving average over steps.
    patience: evaluated epochs without a better one, after which training stops.
    every: epochs between two evaluations.
    seed: of everything random.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: int = 16
    users: int = 32
    rate: float = 2e-3
    decay: float = 0.0
    average: float = 0.99
    patience: int = 3
    every: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {n: (getattr(self, n) > 0, "above 0") for n in ("epochs", "users", "every")}
        refuse(self, {**counts, "rate": (self.rate >= 0, "0 or more")})


def ranks(scores: Tensor, target: Tensor, seen: tuple[Tensor, Tensor]) -> Tensor:
    """Place of each row's target, from 1, among all items but those seen; ties count against it.

    Args:
        scores: (B, V) float; changed.
        target: (B,) int64.
        seen: (row, item) int64 of what is filtered; the target never is.
    """
    own = scores.gather(1, target[:, None])
    scores[seen] = -math.inf
    scores.scatter_(1, target[:, None], own)
    return (scores >= own).sum(1)


def metrics(rank: Tensor) -> dict[str, float]:
    """HR@10, HR@50, NDCG@10 and MRR of ranks (B,), and how many there are."""
    at = rank.double()
    gain = torch.where(at <= 10, 1 / torch.log2(at + 1), torch.zeros_like(at))
    return {
        "users": len(rank),
        "hr@10": (at <= 10).double().mean().item(),
        "ndcg@10": gain.mean().item(),
        "hr@50": (at <= 50).double().mean().item(),
        "mrr": (1 / at).mean().item(),
    }


@torch.inference_mode()
def rank_held_out(
    model: Recommender, log: Log, *, place: int, filtered: int | None = None
) -> Tensor:
    """(U,) int64, the rank of every user's held-out item at `place`.

    Filtered is what the user had before: all of it, or the last `filtered` items.
    """
    model.eval()
    items, found = model.directions(), []
    # users of like length together, so that a batch is no larger than it must be
    order = log.offsets.diff().argsort()
    for users in order.split(_EVALUATED):
        batch = log.evaluation_batch(users, place=place, window=model.config.window)
        last = batch.event_offsets[1:] - 1
        with autocast(log.item.device):
            hidden = model(batch)[last]
        seen = log.seen(users, place=place, last=filtered)
        found.append(ranks(hidden @ items.T, batch.target[last], seen))
    rank = torch.empty_like(order)
    rank[order] = torch.cat(found)
    return rank


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class Training:
    """A model being trained, epoch by epoch; its file holds the last finished one.

    Args:
        log: on the device to train on.
        config: how.
        held_out: `VALIDATION` trains on nothing held out and looks for the best epoch; `TEST`
            trains on the validation items too.
        path: its file; a run that is there already goes on.

    Raises:
        HeadwaterError: the file is of another configuration.
    """

    def __init__(self, log: Log, config: TrainConfig, *, held_out: int, path: Path) -> None:
        self.log, self.config, self.held_out, self.path = log, config, held_out, path
        device = log.item.device
        torch.manual_seed(config.seed)
        self.model = Recommender(config.model, log.items).to(device)
        self.averaged = Recommender(config.model, log.items).to(device)
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.rate, betas=(0.9, 0.98), weight_decay=config.decay
        )
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        if path.exists():
            self._resume()

    @property
    def users(self) -> int:
        """U."""
        return len(self.log.user)

    def done(self, epochs: int) -> bool:
        """Whether all epochs are trained, or none of the last ones was better."""
        trained = len(self.history)
        waited = trained - self.best.get("epoch", trained)
        return trained >= epochs or waited >= self.config.patience * self.config.every

    def run(
        self, epochs: int, *, step: Callable[[int, float], None], report: Callable[..., None]
    ) -> None:
        """Train what is left of `epochs`.

        Args:
            step: called with the users and the loss of each batch.
            report: called with the record of each epoch.
        """
        while not self.done(epochs):
            begun = time.monotonic()
            epoch = len(self.history) + 1
            record: dict[str, float] = {"epoch": epoch, "loss": self._epoch(epoch, step)}
            record["seconds"] = time.monotonic() - begun
            due = epoch % self.config.every == 0 or epoch == self.config.epochs
            if self.held_out == VALIDATION and due:
                record |= metrics(rank_held_out(self.averaged, self.log, place=VALIDATION))
                if record[SELECTED_BY] > self.best.get(SELECTED_BY, -1.0):
                    weights = {k: v.clone() for k, v in self.averaged.state_dict().items()}
                    self.best = {**record, "weights": weights}
            self.history.append(record)
            self._save()
            report(record)

    def _epoch(self, epoch: int, step: Callable[[int, float], None]) -> float:
        """Mean loss of a window of every user. Random by (seed, epoch): a resumed run is the same."""
        seed = self.config.seed * 100_003 + epoch
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        self.model.train()
        losses: list[float] = []
        for users in self._batches(generator):
            batch = self.log.training_batch(
                users, held_out=self.held_out, window=self.config.model.window, generator=generator
            )
            loss = self._step(batch, epoch - 1 + (len(losses) + 1) / self.steps)
            losses.append(loss)
            step(len(users), loss)
        return sum(losses) / len(losses)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return -(-self.users // self.config.users)

    def _batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        order = torch.randperm(self.users, generator=generator).to(self.log.item.device)
        yield from order.split(self.config.users)

    def _step(self, batch: Batch, progress: float) -> float:
        """One step at `progress` epochs."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * schedule(progress, self.config.epochs)
        device = self.log.item.device
        with autocast(device):
            hidden = self.model(batch)
        loss = catalogue_loss(
            hidden, self.model.directions(), batch.target, chunk=_CHUNK[device.type]
        )
        value = loss.item()
        if not math.isfinite(value):
            raise HeadwaterError(
                f"loss is {value}: training diverged; lower --rate, now {self.config.rate}"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            # a young average forgets its random start faster
            share = 1 - min(self.config.average, (1 + 10 * progress) / (10 + 10 * progress))
            torch._foreach_lerp_(
                list(self.averaged.parameters()), list(self.model.parameters()), share
            )
        return value

    def _save(self) -> None:
        """Replace the file in one step."""
        state = {
            "config": asdict(self.config),
            "held_out": self.held_out,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best": self.best,
        }
        with replacing(self.path) as staging:
            torch.save(state, staging)

    def _resume(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        mine = {"config": asdict(self.config), "held_out": self.held_out}
        if {k: state[k] for k in mine} != mine:
            raise HeadwaterError(
                f"out is {str(self.path.parent)!r}: it holds a run of another configuration, "
                f"{state['config']}; name another --out, or empty that one"
            )
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.best = state["history"], state["best"]


def schedule(progress: float, epochs: int) -> float:
    """Share of the highest learning rate: up over the first epoch, then down to zero by a cosine."""
    if progress < 1:
        return progress
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 1) / max(epochs - 1, 1))))
