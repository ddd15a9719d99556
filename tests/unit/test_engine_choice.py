"""Which engine a machine gets, for every Java that it may have."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from jobs import jvm, spark
from jobs.settings import EngineChoice, Settings


def java(folder: Path, says: str) -> Path:
    """A `java` in `folder`/bin that prints what a real one prints, to stderr."""
    path = folder / "bin" / "java"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat >&2 <<'EOF'\n{says}\nEOF\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with the Delta JARs at hand."""
    jars = tmp_path / "jars"
    jars.mkdir()
    (jars / jvm._last_jar()).touch()
    return replace(Settings.from_env({"HEADWATER_HOME": str(tmp_path / "home")}), jars=jars)


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder, `<folder>/bin`, without a Java; the folder."""
    folder = tmp_path / "machine"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return folder


@pytest.mark.parametrize(
    ("says", "major"),
    [
        ('java version "1.8.0_392"\nJava(TM) SE Runtime Environment', 8),
        ('openjdk version "11.0.2" 2019-01-15', 11),
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK 64-Bit Server VM', 17),
        ('openjdk version "21" 2023-09-19', 21),
        ('Picked up JAVA_TOOL_OPTIONS: -Dx=y\nopenjdk version "22-ea" 2024-03-19', 22),
        ("Unable to locate a Java Runtime.", None),
    ],
)
def test_the_version_of_every_java(says: str, major: int | None) -> None:
    assert jvm.parse_java_version(says) == major


@pytest.mark.parametrize(
    ("version", "engine"),
    [("11.0.2", "sail"), ("17.0.15", "spark"), ("21", "spark"), ("1.8.0_392", "sail")],
)
def test_auto_takes_apache_spark_from_java_17_on(
    version: str, engine: str, no_java: Path, settings: Settings
) -> None:
    java(no_java, f'openjdk version "{version}" 2024-01-01')
    assert spark.choose(settings) == engine


def test_java_home_comes_before_path_and_a_broken_one_is_passed_over(
    no_java: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    java(no_java, 'openjdk version "11.0.2"')
    java(tmp_path / "jdk", 'openjdk version "17.0.1"')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert spark.choose(settings) is spark.Engine.SPARK
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    assert spark.choose(settings) is spark.Engine.SAIL


def test_without_java_it_is_sail_and_the_run_says_why(no_java: Path, settings: Settings) -> None:
    assert spark.choose(settings) is spark.Engine.SAIL
    assert "there is no Java" in spark.describe(settings)
    assert spark.engine_name(settings).startswith("sail-")


def test_without_the_jars_it_is_sail(no_java: Path, tmp_path: Path, settings: Settings) -> None:
    java(no_java, 'openjdk version "17.0.1"')
    without = replace(settings, jars=tmp_path / "none")
    assert spark.choose(without) is spark.Engine.SAIL
    assert "Delta JARs" in spark.describe(without)


def test_spark_asked_for_without_java_is_refused_with_the_remedy(
    no_java: Path, settings: Settings
) -> None:
    asked = replace(settings, engine=EngineChoice.SPARK)
    with pytest.raises(spark.EngineError, match="no Java on PATH or in JAVA_HOME: install 17"):
        spark.choose(asked)


def test_a_remote_cluster_wins_and_is_not_ours_to_start(settings: Settings) -> None:
    remote = replace(settings, spark_remote="sc://host:15002")
    assert spark.choose(remote) is spark.Engine.REMOTE
    with pytest.raises(spark.EngineError, match="sc://host:15002"):
        spark.start(remote)


def test_the_jars_belong_to_the_installed_spark_and_delta() -> None:
    spark_minor = ".".join(version("pyspark").split(".")[:2])
    assert (
        jvm.delta_package() == f"io.delta:delta-spark_{spark_minor}_2.13:{version('delta-spark')}"
    )


def test_a_set_of_jars_without_its_last_is_not_a_set(tmp_path: Path, settings: Settings) -> None:
    assert [p.name for p in jvm.delta_jars(settings.jars)] == [jvm._last_jar()]
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "io.delta_delta-storage-4.4.0.jar").touch()
    assert jvm.delta_jars(tmp_path / "partial") == []


def test_apache_spark_gets_plain_paths_wherever_the_checkout_lies(
    tmp_path: Path, settings: Settings
) -> None:
    """Its lists of JARs and its options are parted by commas and spaces, and it takes paths for URIs."""
    weird = tmp_path / "a b é#[1]%41,{x}"
    weird.mkdir()
    elsewhere = Settings.from_env({"HEADWATER_HOME": str(tmp_path / "ho me é")})
    elsewhere = replace(elsewhere, jars=settings.jars.rename(weird / "jars"))
    command, _ = jvm.server_command(elsewhere, port=1, cores=1)
    listed = next(c for c in command if c.startswith("spark.jars="))
    assert Path(listed.partition("=")[2]).is_file() and " " not in listed
    assert not any("ho me" in part or "#" in part for part in command)


def test_a_corrupt_or_foreign_state_file_is_no_server(settings: Settings) -> None:
    settings.spark_dir.mkdir(parents=True)
    for text in ("", "{", "{}", '{"engine": "flink", "url": "", "pid": 1, "started": 0}'):
        (settings.spark_dir / "server.json").write_text(text)
        assert spark._read(settings) is None
    assert spark.stop(settings) is False


def test_a_pid_used_again_by_another_process_is_not_our_server() -> None:
    server = spark.Server(
        engine=spark.Engine.SAIL, url="sc://127.0.0.1:1", pid=os.getpid(), started=0.0
    )
    assert not server.alive()
    assert spark._end(server) is False


def test_a_killed_server_that_nobody_waited_for_is_gone_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stays in the process table while the launcher that started it lives."""
    process = subprocess.Popen(["sleep", "600"])
    started = psutil.Process(process.pid).create_time()
    server = spark.Server(
        engine=spark.Engine.SAIL, url="sc://127.0.0.1:1", pid=process.pid, started=started
    )
    assert not server.ended()
    process.send_signal(signal.SIGKILL)
    os.waitid(
        os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
    )  # dead, and its exit code not asked for
    monkeypatch.setattr(psutil.Process, "wait", lambda *_, **__: pytest.fail("waits for the dead"))
    assert server.ended() and not server.alive()
    assert not spark._end(server)
    process.wait()
