"""One file per dataset, each with a `DATASET`: its spec and nothing else."""

from __future__ import annotations

import importlib
import pkgutil

from feature_store.errors import SpecError
from feature_store.spec import Dataset


def names() -> list[str]:
    """The datasets that there are: the modules of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> Dataset:
    """The spec of dataset `name`.

    Raises:
        SpecError: there is no such dataset.
    """
    if name not in names():
        raise SpecError(
            f"dataset is {name!r}: known are {', '.join(names())}; add feature_store/datasets/<name>.py"
        )
    dataset = importlib.import_module(f"feature_store.datasets.{name}").DATASET
    if dataset.name != name:
        raise SpecError(
            f"Dataset.name is {dataset.name!r} in feature_store/datasets/{name}.py: name them alike"
        )
    return dataset
