"""The configuration of a dataset's models: `feature_store/presets/`, with its types."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from feature_store import presets
from feature_store.errors import SpecError
from feature_store.spec import Dataset
from jobs.training.config import DownstreamTraining, GateConfig, TrainingConfig
from models import upstream
from models.features import feature_plan
from models.upstream import ModelKind

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One upstream model of one dataset.

    Args:
        architecture: a file of `models/upstream/`.
        shape: the configuration of that file.
        training, gate: how the model is trained and judged.
    """

    architecture: str
    shape: Any
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    @property
    def kind(self) -> ModelKind:
        """What the model reads, and which table it publishes from."""
        return upstream.get(self.architecture)

    def build(self, dataset: Dataset, device: torch.device) -> nn.Module:
        """The model with its first weights, drawn from torch's generator."""
        return self.kind.module(feature_plan(dataset), self.shape, device=device)

    def plain(self) -> dict[str, Any]:
        """The same as JSON-ready values, for `from_plain`."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any], where: str) -> Preset:
        """The preset that these values make.

        Args:
            where: they stand, for messages.

        Raises:
            SpecError: a value or a name is none that the configuration knows.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise _unknown(where, name, known)
        architecture = values.get("architecture")
        if not isinstance(architecture, str):
            raise SpecError(
                f"{where}.architecture is missing: name one of {', '.join(upstream.names())}"
            )
        kinds: dict[str, Any] = {
            "shape": upstream.get(architecture).config,
            "training": TrainingConfig,
            "gate": GateConfig,
        }
        parts: dict[str, Any] = {
            name: typed(kind, values.get(name, {}), f"{where}.{name}")
            for name, kind in kinds.items()
        }
        return cls(architecture=architecture, **parts)


def preset(dataset: Dataset, model: str) -> Preset:
    """The configuration of `model` for `dataset`.

    Raises:
        SpecError: no entry has that name, or it holds what the configuration does not know.
    """
    presets.check_models("model", [model], dataset.name)
    entry = presets.upstream(dataset.name)[model]
    return Preset.from_plain(entry.values, entry.where)


def downstream_training(dataset: Dataset) -> DownstreamTraining:
    """The budget of the downstream models of `dataset`.

    Raises:
        SpecError: its entry holds what the configuration does not know.
    """
    entry = presets.downstream(dataset.name)
    return typed(DownstreamTraining, entry.values, entry.where)


def typed(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """The dataclass `kind` with these values, dataclasses inside it too; enums are enums again.

    Raises:
        SpecError: names the first setting that is wrong, and the nearest that is known.
    """
    try:
        return TypeAdapter(kind).validate_python(values, extra="forbid")
    except ValidationError as error:
        wrong = error.errors()[0]
        path = [str(part) for part in wrong["loc"]]
        at = ".".join([where, *path])
        if wrong["type"] == "unexpected_keyword_argument":
            *parents, name = path
            known = _settings_of(kind, parents)
            raise _unknown(at.removesuffix(f".{name}"), name, known) from None
        if wrong["type"] == "missing":
            raise SpecError(f"{at} is missing: give it a value") from None
        raise SpecError(f"{at} is {wrong['input']!r}: {wrong['msg']}") from None


def _settings_of(kind: Any, path: list[str]) -> list[str]:
    """Names of the settings of the dataclass that lies at `path` in `kind`."""
    schema = TypeAdapter(kind).json_schema()
    at = schema
    for name in path:
        at = at["properties"][name]
        at = schema["$defs"][at["$ref"].rsplit("/")[-1]] if "$ref" in at else at
    return list(at.get("properties", ()))


def _unknown(where: str, name: str, known: list[str]) -> SpecError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return SpecError(
        f"{where} has {name!r}, which is no setting: {hint}known are {', '.join(known)}"
    )
