"""Training and ranking."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.movielens.data import VALIDATION, Batch, Log
from benchmarks.movielens.model import ModelConfig, Recommender, catalogue_loss
from feature_store.errors import HeadwaterError

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
    average: of the weights that are evaluated, an exponential moving average over steps.
    patience: evaluated epochs without a better one, after which training stops.
    every: epochs between two evaluations.
    seed: of everything random.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: int = 16
    users: int = 32
    rate: float = 2e-3
    average: float = 0.99
    patience: int = 3
    every: int = 2
    seed: int = 0


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
    """A model being trained, epoch by epoch.

    Args:
        log: on the device to train on.
        config: how.
        held_out: `VALIDATION` trains on nothing held out and looks for the best epoch; `TEST`
            trains on the validation items too.

    Attributes:
        averaged: the model with the weights that are evaluated.
        history: a record of each epoch.
        best: that of the best by the validation items, with its "weights".
    """

    def __init__(self, log: Log, config: TrainConfig, *, held_out: int) -> None:
        self.log, self.config, self.held_out = log, config, held_out
        device = log.item.device
        torch.manual_seed(config.seed)
        self.model = Recommender(config.model, log.items).to(device)
        self.averaged = Recommender(config.model, log.items).to(device)
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}

    def run(self, epochs: int, *, report: Callable[[dict[str, float]], None]) -> None:
        """Train `epochs`, or until none of the last ones was better; `report` gets each one's record."""
        patience = self.config.patience * self.config.every
        for epoch in range(1, epochs + 1):
            if epoch - 1 - self.best.get("epoch", epoch - 1) >= patience:
                break
            begun = time.monotonic()
            record: dict[str, float] = {"epoch": epoch, "loss": self._epoch(epoch)}
            record["seconds"] = time.monotonic() - begun
            due = epoch % self.config.every == 0 or epoch == self.config.epochs
            if self.held_out == VALIDATION and due:
                record |= metrics(rank_held_out(self.averaged, self.log, place=VALIDATION))
                if record[SELECTED_BY] > self.best.get(SELECTED_BY, -1.0):
                    weights = {k: v.clone() for k, v in self.averaged.state_dict().items()}
                    self.best = {**record, "weights": weights}
            self.history.append(record)
            report(record)

    def _epoch(self, epoch: int) -> float:
        """Mean loss of a window of every user."""
        seed = self.config.seed * 100_003 + epoch
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        self.model.train()
        order = torch.randperm(len(self.log.user), generator=generator).to(self.log.item.device)
        batches = order.split(self.config.users)
        losses: list[float] = []
        for users in batches:
            batch = self.log.training_batch(
                users, held_out=self.held_out, window=self.config.model.window, generator=generator
            )
            losses.append(self._step(batch, epoch - 1 + (len(losses) + 1) / len(batches)))
        return sum(losses) / len(losses)

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
                f"loss is {value}: training diverged; lower TrainConfig.rate, now {self.config.rate}"
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


def schedule(progress: float, epochs: int) -> float:
    """Share of the highest learning rate: up over the first epoch, then down to zero by a cosine."""
    if progress < 1:
        return progress
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 1) / max(epochs - 1, 1))))
