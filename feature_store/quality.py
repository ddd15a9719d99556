"""Quality gate (being written)."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as pads

from feature_store.spec import Dataset


def validate(
    dataset: Dataset, table: str, ds: str, data: pads.Dataset, *, docs_root: Path, model: str = ""
) -> None:
    """Nothing yet."""
