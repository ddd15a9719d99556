"""The upstream models: one file each, with its configuration, its module and its `KIND`.

The file's name is the architecture that a preset names. To add a model is to add a file here, and a preset
that names it in `feature_store/presets/`; nothing else asks which models there are.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from torch import nn

from feature_store.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """What the pipeline has to know of an upstream model.

    Args:
        config: dataclass of its shape. Every field has a default.
        module: `module(plan, config, device=device)` is the model with its first weights, drawn from
            torch's generator. It has `plan` (FeaturePlan), `tables` (`models.tables.Tables`),
            `forward(batch) -> Outputs` and `user_embeddings(batch, at=None) -> (R, K, D) float32`,
            where `at` (R,) int64 are instants in UTC microseconds by which all events of a row were
            available, and None stands for what served the day of the row's targets.
        history: it reads event histories. Without, batches come without events.
        user_features: it reads the nightly user features. Without, batches come without them.
        user_table: `sequences` or `aggregates`: the one table that its user embeddings are published from.
    """

    config: type[Any]
    module: type[nn.Module]
    history: bool
    user_features: bool
    user_table: str


def names() -> list[str]:
    """The architectures that there are: the modules of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> ModelKind:
    """The upstream model of architecture `name`.

    Raises:
        SpecError: there is none.
    """
    if name not in names():
        raise SpecError(
            f"architecture is {name!r}: known are {', '.join(names())}; add models/upstream/<name>.py"
        )
    kind = importlib.import_module(f"{__name__}.{name}").KIND
    assert isinstance(kind, ModelKind), name
    return kind
