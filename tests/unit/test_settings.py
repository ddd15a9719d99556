"""Settings: what the environment decides, read once."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(
    "name", ["a b", "é木", "x#1", "l*x", "q?z{a,b}", 'it\'s "it"', "$HOME;&", "100% x"]
)
def test_a_home_of_any_name_is_reached_by_a_plain_path(tmp_path: Path, name: str) -> None:
    settings = Settings.from_env({"HEADWATER_HOME": str(tmp_path / name)})
    assert settings.home.resolve() == tmp_path / name
    assert all(c.isalnum() or c in "/._-" for c in f"{settings.home}{settings.lake_root}")
    assert Settings.from_env({"HEADWATER_HOME": str(settings.home)}) == settings
    lake = Settings.from_env({"HEADWATER_HOME": "/data", "HEADWATER_LAKE": str(tmp_path / name)})
    assert Path(lake.lake_root).resolve() == tmp_path / name and lake.lake_root.isascii()
    remote = {"SPARK_REMOTE": "sc://host:1", "HEADWATER_HOME": str(tmp_path / name)}
    assert Settings.from_env(remote).home == tmp_path / name


@pytest.mark.parametrize("name", ["l[1]", "p%41", "x^2", "a|b", "back\\s", "two\nlines"])
def test_a_folder_that_delta_cannot_open_is_refused_unless_the_lake_lies_elsewhere(
    tmp_path: Path, name: str
) -> None:
    env = {"HEADWATER_HOME": str(tmp_path / name)}
    with pytest.raises(SpecError, match=r"HEADWATER_HOME is .*; set HEADWATER_HOME to one without"):
        Settings.from_env(env)
    assert (
        Settings.from_env({**env, "HEADWATER_LAKE": "/big/lake"}).home.resolve() == tmp_path / name
    )
    with pytest.raises(SpecError, match="HEADWATER_LAKE is"):
        Settings.from_env({"HEADWATER_HOME": "/data", "HEADWATER_LAKE": str(tmp_path / name)})


def test_a_link_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(SpecError, match=r"folder is .*a file/home.*cannot be made"):
        Settings.from_env({"HEADWATER_HOME": str(tmp_path / "a file" / "home")})
    monkeypatch.setattr("jobs.paths._LINKS", tmp_path)
    (tmp_path / f"headwater-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(SpecError, match="belongs to somebody else"):
        Settings.from_env({"HEADWATER_HOME": str(tmp_path / "a b")})
