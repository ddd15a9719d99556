"""The house: imports run one way, DAG files stay light, files small, datasets in their rooms."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from feature_store.spec import Dataset

ROOT = Path(__file__).parents[2]
ROOMS = ("dags", "jobs", "models", "feature_store")
MAY_IMPORT = {
    "dags": {"dags", "feature_store"},
    "jobs": {"jobs", "models", "feature_store"},
    "models": {"models", "feature_store"},
    "feature_store": {"feature_store"},
}
MODELS_MAY_READ = {"feature_store.spec", "feature_store.columns", "feature_store.errors"}
HEAVY = {"pyspark", "torch", "torchrec", "mlflow", "great_expectations", "pandas"}
MAX_LINES = 450


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of everything `path` imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which room it reaches into"
            module = node.module or ""
            found |= (
                {module}
                if module in MODELS_MAY_READ
                else {f"{module}.{a.name}" for a in node.names}
            )
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    for path in modules(room):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in ROOMS or top in MAY_IMPORT[room], (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_models_read_of_the_feature_store_only_the_spec() -> None:
    for path in modules("models"):
        for name in imports(path):
            if name.split(".")[0] == "feature_store":
                assert any(name.startswith(ok) for ok in MODELS_MAY_READ), (
                    f"{path.name} imports {name}"
                )


def test_dag_files_import_nothing_heavy() -> None:
    for path in modules("dags"):
        assert not {n.split(".")[0] for n in imports(path)} & HEAVY, path


def test_a_dataset_is_named_only_in_its_own_rooms() -> None:
    datasets = {p.stem for p in (ROOT / "feature_store/datasets").glob("*.py")} - {"__init__"}
    datasets -= {f.name for f in fields(Dataset)}  # `simulated` is a flag of the spec as well
    for room in ROOMS:
        for path in modules(room):
            if {"datasets", "sources"} & set(path.parts):
                continue
            names = {
                node.value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert not names & datasets, (
                f"{path.relative_to(ROOT)} names a dataset: {names & datasets}"
            )


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_stays_small(room: str) -> None:
    for path in modules(room):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, (
            f"{path.relative_to(ROOT)} has {lines} lines: it answers two questions"
        )
