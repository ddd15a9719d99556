"""Airflow reads its settings when it is imported: they are made before any test of this folder is."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def airflow_environment(home: str) -> dict[str, str]:
    """Settings of an Airflow that only parses."""
    return {
        "AIRFLOW_HOME": home,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "dags" / "plugins"),
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
    }


_SCRATCH = tempfile.TemporaryDirectory(prefix="airflow-")
_SETTINGS: Mapping[str, str] = airflow_environment(_SCRATCH.name)
os.environ.update(_SETTINGS)
sys.path.insert(0, str(ROOT / "dags" / "plugins"))  # as Airflow does
