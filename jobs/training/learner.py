"""An upstream model in training: which labels it learns, and what holds it near the day before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from feature_store.columns import NO_LABEL
from feature_store.errors import SpecError
from feature_store.spec import Dataset, IdType, Kind
from jobs.training.by_name import Taken
from jobs.training.config import Shift
from jobs.training.ids import int64_ids
from jobs.training.presets import Preset
from jobs.training.trainer import Step, Trainer
from models.batch import Batch
from models.loss import distillation, embedding_shift, multi_task_loss
from models.outputs import Outputs


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


class Learner(Trainer[Batch]):
    """The training of an upstream model, and what a trained one says.

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
        training = preset.training
        self.dataset, self.preset, self.training = dataset, preset, training
        self.domain = None if training.domain is None else domain_id(dataset, training.domain)
        super().__init__(preset.build(dataset, device), training, device)
        weights = dict(training.task_weights)
        self.task_weights = torch.tensor([weights.get(t.name, 1.0) for t in dataset.tasks]).to(
            device
        )
        self.parent: nn.Module | None = None
        self.parent_knows = torch.zeros(len(dataset.tasks), dtype=torch.bool, device=device)
        self.taken = Taken() if state is None else self.take(state)

    def keep_parent(self, tasks: Collection[str]) -> None:
        """The weights as they are now are the parent's, for the rest of the day's training.

        Without a shift term nothing is kept.

        Args:
            tasks: that it was trained on. Of the others its predictions are those of first weights, and
                distillation leaves them out.
        """
        if self.training.shift == Shift.NONE:
            return
        # not a deep copy: the fused tables cannot be copied, only built
        parent = self.preset.build(self.dataset, self.device).eval().requires_grad_(False)
        parent.load_state_dict(self.model.state_dict())
        self.parent = parent
        knows = [task.name in tasks for task in self.dataset.tasks]
        self.parent_knows = torch.tensor(knows, device=self.device)

    def batch(self, item: Batch) -> Batch:
        """The item."""
        return item

    def loss(self, item: Batch) -> Step:
        """Log loss of all tasks, of each kind of logits; and the term of embedding shift, with a parent."""
        batch = item.to(self.device, non_blocking=True)
        labels = self._labels(batch)
        with self.precision():
            outputs = self.model(batch)
        logits = outputs.logits if outputs.members is None else outputs.members
        loss = multi_task_loss(logits, labels, self.task_weights)
        total = loss.total
        if outputs.user_logits is not None:
            total = total + multi_task_loss(outputs.user_logits, labels, self.task_weights).total
        if self.parent is not None:
            term = self._shift_term(self.parent, batch, labels, outputs)
            total = total + self.training.shift_weight * term
        return Step(total, loss.per_task, loss.counts, (labels == 1).sum(0))

    def _labels(self, batch: Batch) -> Tensor:
        """(T, n_tasks): the labels, but for those of other domains than the one trained on."""
        if self.domain is None:
            return batch.labels
        mine = batch.context_ids[str(self.dataset.domain)] == self.domain
        return torch.where(mine[:, None], batch.labels, NO_LABEL)

    def _shift_term(
        self, parent: nn.Module, batch: Batch, labels: Tensor, outputs: Outputs
    ) -> Tensor:
        """() float32: how far `outputs` are from what the parent says of the batch."""
        if self.training.shift == Shift.REGULARISE:
            with torch.no_grad(), self.precision():
                users = parent.user_embeddings(batch)
            return embedding_shift(outputs.users, users)
        with torch.no_grad(), self.precision():
            before = parent(batch)
        labels = torch.where(self.parent_knows, labels, NO_LABEL)
        return distillation(outputs, before, labels, self.task_weights)

    @torch.no_grad()
    def probabilities(self, batch: Batch) -> Tensor:
        """(T, n_tasks) float32 on the CPU."""
        self.model.eval()
        with self.precision():
            outputs = self.model(batch.to(self.device))
        return torch.sigmoid(outputs.logits.float()).cpu()

    @torch.no_grad()
    def user_embeddings(self, batch: Batch, at: int | None = None) -> Tensor:
        """(R, K, D) float32 on the CPU: what served the day of the rows' targets; or, with `at`, of users as
        they are at that instant (UTC microseconds), by which all of their events were available."""
        self.model.eval()
        with self.precision():
            batch = batch.to(self.device)
            instants = None if at is None else batch.event_offsets.new_full((batch.rows,), at)
            return self.model.user_embeddings(batch, instants).float().cpu()
