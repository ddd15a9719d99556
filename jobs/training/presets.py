"""Model configuration by dataset and model name: how large, how trained, how judged.

A variant of a model is a name of its own (`sum_k4` beside `sum`), in `feature_store/model_names.py`
and in the dataset's `models`, with an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from feature_store.embeddings import EmbeddingKind
from feature_store.model_names import check_models, domain_value
from feature_store.spec import Dataset
from jobs.training.config import DownstreamTraining, GateConfig, Shift, TrainingConfig
from jobs.training.loader import Limits
from models.features import feature_plan
from models.hybrid import Hybrid, HybridConfig
from models.sequence import Sequence, served_prefix
from models.sequence_config import SequenceConfig
from models.sum import Sum, SumConfig
from models.tables import TableConfig

if TYPE_CHECKING:
    from models.batch import Batch


class Architecture(StrEnum):
    """Which module a model is."""

    SUM = "sum"
    SEQUENCE = "sequence"
    HYBRID = "hybrid"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One upstream model of one dataset.

    Args:
        architecture: which module.
        sum, sequence, hybrid: shape of it; the others' are not used.
        training, gate: how it is trained and judged.
    """

    architecture: Architecture
    sum: SumConfig | None = None
    sequence: SequenceConfig | None = None
    hybrid: HybridConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    @property
    def history(self) -> bool:
        """Whether the model reads event histories."""
        return self.architecture != Architecture.SUM

    @property
    def user_features(self) -> bool:
        """Whether the model reads the nightly user features."""
        return self.architecture != Architecture.SEQUENCE

    @property
    def user_table(self) -> str:
        """The one table that its user embeddings are published from (the hybrid's read events only)."""
        return "sequences" if self.history else "aggregates"

    def build(self, dataset: Dataset, device: torch.device) -> nn.Module:
        """The model with its first weights, drawn from torch's generator."""
        plan = feature_plan(dataset)
        if self.architecture == Architecture.SUM:
            return Sum(plan, self.sum or SumConfig(), device=device)
        if self.architecture == Architecture.HYBRID:
            return Hybrid(plan, self.hybrid or HybridConfig(), device=device)
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


def _small_tables() -> TableConfig:
    return TableConfig(dim=32, default_rows=2**12, item_rows=2**14)


def _sum() -> Preset:
    return Preset(architecture=Architecture.SUM, sum=SumConfig(tables=_small_tables()))


def _sequence() -> Preset:
    return Preset(
        architecture=Architecture.SEQUENCE, sequence=SequenceConfig(tables=_small_tables())
    )


def _hybrid() -> Preset:
    return Preset(architecture=Architecture.HYBRID, hybrid=HybridConfig(tables=_small_tables()))


def _quick_tables() -> TableConfig:
    """With them users and candidates match within some hundred steps: ten small days have no more."""
    return replace(_small_tables(), init_scale=0.6)


def _quick_sum() -> Preset:
    shape = SumConfig(tables=_quick_tables())
    return Preset(
        architecture=Architecture.SUM,
        sum=replace(
            shape,
            user=replace(shape.user, interactions=("dot",)),
            mix=replace(shape.mix, direct=True),
        ),
        training=TrainingConfig(limits=Limits(max_targets=256)),
    )


_Events = TypeVar("_Events", bound=SequenceConfig)


def _quick_events(shape: _Events) -> _Events:
    """The shape of a model with histories, whose published embeddings are found as quickly."""
    return replace(
        shape,
        tables=_quick_tables(),
        bags=True,
        user_mix=replace(shape.user_mix, interactions=("dot",), direct=True),
    )


def _quick_sequence() -> Preset:
    return Preset(architecture=Architecture.SEQUENCE, sequence=_quick_events(SequenceConfig()))


def _quick_hybrid() -> Preset:
    shape = HybridConfig()
    matching = replace(
        shape,
        user=replace(shape.user, interactions=("dot",)),
        mix=replace(shape.mix, interactions=("dot",)),
    )
    return Preset(architecture=Architecture.HYBRID, hybrid=_quick_events(matching))


Factory = Callable[[], Preset]


def _on_globo(base: Factory) -> Factory:
    def build() -> Preset:
        found = base()
        tables = TableConfig(dim=32, default_rows=2**12, item_rows=2**17)
        # what is set here was chosen on 12 October, after training on 8 to 11
        training = TrainingConfig(limits=Limits(max_targets=2048, max_events=32_768), muon=True)
        if found.history:
            # articles live for a day or two, and so do topics, blocks of 256 of them: their ids are
            # learned by heart, and a second pass then costs
            tables = replace(tables, learning_rate=0.03, item_rows=1, rows={"topic": 1})
            limits = Limits(max_targets=512, max_events=32_768)
            training = replace(training, limits=limits, average=0.997, epochs=2)
        return replace(
            found,
            sum=found.sum and replace(found.sum, tables=replace(tables, dim=64)),
            sequence=found.sequence and replace(found.sequence, tables=tables, members=3),
            hybrid=found.hybrid and replace(found.hybrid, tables=tables, members=3),
            training=training,
        )

    return build


def _trained(base: Factory, **changes: Any) -> Factory:
    """The same model with `changes` to its TrainingConfig."""

    def build() -> Preset:
        found = base()
        return replace(found, training=replace(found.training, **changes))

    return build


def _with_shift(bases: Mapping[str, Factory]) -> dict[str, Factory]:
    """The models, and each with each answer to embedding shift: `sum_regularise`, `sum_distil`, ..."""
    return dict(bases) | {
        f"{name}_{shift}": _trained(base, shift=shift)
        for name, base in bases.items()
        for shift in (Shift.REGULARISE, Shift.DISTIL)
    }


_DOWNSTREAM = {
    # interests move from day to day there, and the mean over three days dulls them (docs/decisions.md)
    "simulated": DownstreamTraining(kind=EmbeddingKind.RAW),
    # chosen on 12 October, after training on 8 to 11; topics as upstream
    "globo": DownstreamTraining(
        standardise=False,
        tables=replace(
            DownstreamTraining().tables, rows={"topic": 1}, init_scale=0.3, learning_rate=0.05
        ),
    ),
}

_USUAL: dict[str, Factory] = {"sum": _sum, "sequence": _sequence, "hybrid": _hybrid}
_SIMULATED: dict[str, Factory] = {
    "sum": _quick_sum,
    "sequence": _quick_sequence,
    "hybrid": _quick_hybrid,
}
_GLOBO: dict[str, Factory] = {name: _on_globo(base) for name, base in _USUAL.items()}

_BY_NAME = _with_shift(_USUAL)
_BY_DATASET = {"simulated": _with_shift(_SIMULATED), "globo": _with_shift(_GLOBO)}


def downstream_training(dataset: Dataset) -> DownstreamTraining:
    """The budget of the downstream models of `dataset`."""
    return _DOWNSTREAM.get(dataset.name, DownstreamTraining())


def preset(dataset: Dataset, model: str) -> Preset:
    """The configuration of `model` for `dataset`: its own, or the model's usual one.

    Raises:
        SpecError: no configuration has that name.
    """
    check_models("model", [model], dataset.domain)
    known = _BY_DATASET.get(dataset.name, _BY_NAME)
    domain = domain_value(model, dataset.domain)
    if domain is not None:
        return _trained(known["sum"], domain=domain)()
    return known[model]()
