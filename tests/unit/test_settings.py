"""Settings: what the environment decides, read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_store.errors import SpecError
from jobs.settings import REPOSITORY, EngineChoice, Settings


def test_everything_a_run_writes_lies_under_home() -> None:
    settings = Settings.from_env({"HEADWATER_HOME": "/data/headwater"})
    home = Path("/data/headwater")
    written = [
        Path(settings.lake_root),
        Path(settings.mlflow_uri.removeprefix("sqlite:///")),
        settings.mlflow_artifacts,
        settings.airflow_home,
        settings.spark_dir,
        settings.snapshot_dir("d", "sum", "2024-05-01"),
        settings.downstream_dir("d", "click"),
        settings.report_dir("d"),
        settings.quality_dir("d"),
    ]
    assert all(path.is_relative_to(home) for path in written)
    assert len(set(written)) == len(written)


def test_without_a_home_it_is_var_in_the_checkout() -> None:
    assert Settings.from_env({}).home == REPOSITORY / "var"
    assert Settings.from_env({"HEADWATER_HOME": ""}).home == REPOSITORY / "var"


def test_a_relative_home_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.from_env({"HEADWATER_HOME": "here"}).home == tmp_path.resolve() / "here"


def test_the_lake_may_lie_elsewhere_and_a_uri_stays_as_it_is() -> None:
    env = {"HEADWATER_HOME": "/data", "HEADWATER_LAKE": "s3://bucket/lake"}
    assert Settings.from_env(env).lake_root == "s3://bucket/lake"
    assert Settings.from_env({**env, "HEADWATER_LAKE": "/big/lake"}).lake_root == "/big/lake"


@pytest.mark.parametrize("engine", EngineChoice)
def test_the_engine_is_named_in_any_case(engine: EngineChoice) -> None:
    assert Settings.from_env({"HEADWATER_ENGINE": engine.upper()}).engine is engine


def test_an_unknown_engine_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(SpecError, match="HEADWATER_ENGINE is 'flink': use auto, spark, sail"):
        Settings.from_env({"HEADWATER_ENGINE": "flink"})


def test_a_cluster_and_a_tracking_server_are_taken_from_their_own_variables() -> None:
    env = {"SPARK_REMOTE": "sc://host:15002", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    settings = Settings.from_env(env)
    assert (settings.spark_remote, settings.mlflow_uri) == (
        "sc://host:15002",
        "http://mlflow:5000",
    )
