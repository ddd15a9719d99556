"""Model configuration by dataset and model name: how large, how trained, how judged.

A variant of a model is a name of its own (`sum_k4` beside `sum`) with an entry here, and in the
dataset's `models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from feature_store.errors import SpecError
from feature_store.spec import Dataset
from jobs.training.config import GateConfig, TrainingConfig
from jobs.training.loader import Limits
from models.features import feature_plan
from models.sequence import Sequence, SequenceConfig, served_prefix
from models.sum import Sum, SumConfig
from models.tables import TableConfig

if TYPE_CHECKING:
    from models.batch import Batch


class Architecture(StrEnum):
    """Which module a model is."""

    SUM = "sum"
    SEQUENCE = "sequence"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One upstream model of one dataset.

    Args:
        architecture: which module.
        sum, sequence: shape of it; the other's is not used.
        training, gate: how it is trained and judged.
    """

    architecture: Architecture
    sum: SumConfig | None = None
    sequence: SequenceConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    @property
    def history(self) -> bool:
        """Whether the model reads event histories."""
        return self.architecture == Architecture.SEQUENCE

    @property
    def user_features(self) -> bool:
        """Whether the model reads the nightly user features."""
        return self.architecture == Architecture.SUM

    @property
    def user_table(self) -> str:
        """The table that its user embeddings are published from."""
        return "sequences" if self.history else "aggregates"

    def build(self, dataset: Dataset, device: torch.device) -> nn.Module:
        """The model with its first weights, drawn from torch's generator."""
        plan = feature_plan(dataset)
        if self.architecture == Architecture.SUM:
            return Sum(plan, self.sum or SumConfig(), device=device)
        return Sequence(plan, self.sequence or SequenceConfig(), device=device)

    def embed(self, model: nn.Module, batch: Batch, at: int | None = None) -> Tensor:
        """User embeddings (R, K, D).

        Args:
            model: what `build` gave.
            batch: rows of `examples`; or, with `at`, rows of users as they are at that instant
                (UTC microseconds), all of whose events count.
        """
        if not self.history:
            return model.user_embeddings(batch)
        if at is None:
            end, instant = served_prefix(batch, model.plan)
        else:
            end = batch.event_offsets.diff()
            instant = torch.full_like(end, at)
        return model.user_embeddings(batch, end, instant)


def _small_tables(**rows: int) -> TableConfig:
    return TableConfig(dim=32, default_rows=2**12, item_rows=2**14, rows=dict(rows))


def _sum() -> Preset:
    return Preset(architecture=Architecture.SUM, sum=SumConfig(tables=_small_tables()))


def _sequence() -> Preset:
    return Preset(
        architecture=Architecture.SEQUENCE, sequence=SequenceConfig(tables=_small_tables())
    )


def _on_globo(base: Callable[[], Preset]) -> Callable[[], Preset]:
    def build() -> Preset:
        found = base()
        tables = TableConfig(dim=32, default_rows=2**12, item_rows=2**17)
        return replace(
            found,
            sum=found.sum and replace(found.sum, tables=tables),
            sequence=found.sequence and replace(found.sequence, tables=tables),
            training=TrainingConfig(limits=Limits(max_targets=2048, max_events=32_768)),
        )

    return build


_BY_NAME: dict[str, Callable[[], Preset]] = {"sum": _sum, "sequence": _sequence}
_BY_DATASET: dict[tuple[str, str], Callable[[], Preset]] = {
    ("globo", "sum"): _on_globo(_sum),
    ("globo", "sequence"): _on_globo(_sequence),
}


def preset(dataset: Dataset, model: str) -> Preset:
    """The configuration of `model` for `dataset`: its own, or the model's usual one.

    Raises:
        SpecError: no configuration has that name.
    """
    found = _BY_DATASET.get((dataset.name, model)) or _BY_NAME.get(model)
    if found is None:
        raise SpecError(
            f"Dataset({dataset.name}).models has {model!r}, which has no configuration: known are "
            f"{', '.join(_BY_NAME)}; add one to jobs/training/presets.py"
        )
    return found()
