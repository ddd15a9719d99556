"""How models are trained and judged; plain values that a snapshot or a result records and rebuilds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from feature_store.embeddings import EmbeddingKind
from feature_store.errors import SpecError
from jobs.training.loader import Limits
from models.tables import TableConfig


class Shift(StrEnum):
    """What, beside average pooling, keeps a day's embeddings near the parent snapshot's.

    Formulas are in `models/loss.py`. Either costs a forward pass of the parent per batch, and the
    memory of a second model.
    """

    NONE = "none"
    REGULARISE = "regularise"  # the distance between the two models' user embeddings
    DISTIL = "distil"  # cross-entropy against the parent's predictions


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How any model is optimized.

    Args:
        epochs: passes over the data.
        learning_rate: of everything but the embedding tables (theirs is the model's).
        muon: matrices are moved by Muon (`muon.py`); off: by Adam, as the rest is.
        average: decay of the moving average of the weights per step; 0: none. The average is what is
            scored and published, and training goes on from the weights themselves.
        max_grad_norm: gradients of the same are clipped to it; None: they are not.
        threads: of torch on a CPU. Part of the configuration, as sums depend on it in the last bit.
        checkpoint_every_s: seconds between checkpoints to resume from, where a training keeps any.
    """

    epochs: int = 1
    learning_rate: float = 2e-3
    muon: bool = False
    average: float = 0.99
    max_grad_norm: float | None = 1.0
    threads: int = 1
    checkpoint_every_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Optimization):
    """One day's training of an upstream model. One epoch where single ids have embeddings: these overfit
    when they see a label twice.

    Args:
        task_weights: (task, weight in the loss); 1 where a task is not named.
        domain: value of the dataset's domain feature (a string, where its ids are) whose targets'
            labels are trained on; None: all. Everything else is still scored.
        shift, shift_weight: the term of the loss that looks back at the parent, and its weight. A
            model's first day has no parent, and no such term.
        catch_up_days: days before its own whose labels a training reads as well, where no champion was
            trained on them: their candidates were rejected.
        limits: of the batches trained on.
        inference: of the batches that are only scored.
    """

    task_weights: tuple[tuple[str, float], ...] = ()
    domain: int | str | None = None
    shift: Shift = Shift.NONE
    shift_weight: float = 1.0
    catch_up_days: int = 7
    limits: Limits = field(default_factory=lambda: Limits(max_targets=512))
    inference: Limits = field(default_factory=lambda: Limits(max_targets=512))

    def __post_init__(self) -> None:
        if self.shift not in tuple(Shift):
            raise SpecError(
                f"TrainingConfig.shift is {self.shift!r}: known are {', '.join(Shift)}; name one"
            )
        if self.shift_weight < 0:
            raise SpecError(
                f"TrainingConfig.shift_weight is {self.shift_weight}: a weight is 0 or more"
            )
        if self.catch_up_days < 0:
            raise SpecError(
                f"TrainingConfig.catch_up_days is {self.catch_up_days}: give 0 or more days"
            )


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a candidate has to show on the held-out users before it becomes champion.

    Args:
        ne_tolerance: its NE, averaged over tasks, may be above the champion's by this much: it is rejected
            where the whole interval of the difference lies above.
        min_labels, min_users: tasks with fewer held-out labels, or of fewer users, take no part in that
            average; where none does, the candidate is not judged.
        confidence, bootstrap_samples: of that interval, a paired bootstrap over users.
        min_cosine: least mean cosine between a user's embeddings by candidate and by champion.
        max_l2: largest mean L2 distance between them, relative to the champion's mean norm.
    """

    ne_tolerance: float = 0.01
    min_labels: int = 200
    min_users: int = 20
    confidence: float = 0.95
    bootstrap_samples: int = 1000
    min_cosine: float = 0.0
    max_l2: float = 3.0


@dataclass(frozen=True, kw_only=True)
class DownstreamTraining(Optimization):
    """The budget of every arm of a downstream comparison. In one epoch an arm may take too few steps to
    read an embedding.

    Args:
        max_train_targets, max_test_targets: above them a share of the users is taken.
        batch_targets: targets of a batch. Small: a model that has taken too few steps tells nothing
            about its inputs.
        published_learning_rate: of what reads the published embeddings. Larger, since it starts at zero and
            is not learned before the rest (LoRA+, arXiv 2402.12354).
        bootstrap_samples: of the intervals.
        importance_targets: test targets that permutation importance is measured on.
        kind: of the published embeddings that are read.
        standardise: them, number by number, before they are read.
        tables: of ids. None of items, which would be learned by heart in the second pass; the others
            start small and learn slowly, or the arm with user features overfits in it.
    """

    epochs: int = 2
    max_grad_norm: float | None = None
    max_train_targets: int = 80_000
    max_test_targets: int = 30_000
    batch_targets: int = 256
    published_learning_rate: float = 6e-3
    bootstrap_samples: int = 300
    importance_targets: int = 6_000
    kind: EmbeddingKind = EmbeddingKind.POOLED
    standardise: bool = True
    tables: TableConfig = field(
        default_factory=lambda: TableConfig(
            dim=16, default_rows=2**12, item_rows=1, init_scale=0.05, learning_rate=0.01
        )
    )
