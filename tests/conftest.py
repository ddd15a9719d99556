"""Fixtures that the tests share: an engine of each kind, started once, and folders that are thrown away.

def test_something(spark): ...                                   # Sail: it starts in a second
@pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
def test_something(spark): ...                                   # once on each
def test_something(spark_of): spark_of("sail"), spark_of("spark")  # both at once
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from jobs import jvm
from jobs import spark as engines
from jobs.settings import EngineChoice, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# as trainings have it; threads that spin beside other processes make small steps ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on the CPU

hypothesis.settings.register_profile(
    "tests",
    deadline=None,  # a shared machine is slow at times
    derandomize=True,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("tests")


def _skip_without(engine: str) -> None:
    if engine == "spark" and (jvm.java_version() or 0) < jvm.MIN_JAVA:
        pytest.skip(f"Apache Spark needs Java {jvm.MIN_JAVA} or newer on PATH or in JAVA_HOME")
    if engine == "spark" and not jvm.delta_jars(Settings.from_env({}).jars):
        pytest.skip("the Delta JARs are not in .jars/: python -m jobs.spark jars")


@pytest.fixture(autouse=True)
def _own_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test sees the settings of the shell that it was started from, or writes to `var/`."""
    for name in os.environ:
        if name == "SPARK_REMOTE" or (name.startswith("HEADWATER_") and name != "HEADWATER_GLOBO"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HEADWATER_HOME", str(tmp_path_factory.getbasetemp() / "var"))


@pytest.fixture
def lake_home(tmp_path: Path) -> Path:
    """An empty `HEADWATER_HOME`."""
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture(scope="session")
def settings_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Settings]]:
    """Settings of a shared home with that engine; its server is ended with the session."""
    made: dict[str, Settings] = {}

    def get(engine: str) -> Settings:
        _skip_without(engine)
        if engine not in made:
            home = tmp_path_factory.mktemp(engine)
            made[engine] = Settings.from_env(
                {
                    "HEADWATER_HOME": str(home),
                    "HEADWATER_ENGINE": EngineChoice(engine),
                    "HEADWATER_SPARK_MEMORY": "2g",
                }
            )
        return made[engine]

    yield get
    for settings in made.values():
        engines.stop(settings)


@pytest.fixture(scope="session")
def spark_of(settings_of: Callable[[str], Settings]) -> Iterator[Callable[[str], SparkSession]]:
    """A session of that engine, one for all tests."""
    made: dict[str, SparkSession] = {}

    def get(engine: str) -> SparkSession:
        settings = settings_of(engine)
        if engine not in made:
            made[engine] = engines.session(settings)
        return made[engine]

    yield get
    for session in made.values():
        session.stop()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The engine of `spark`; parametrize it indirectly with "sail" and "spark"."""
    return str(getattr(request, "param", "sail"))


@pytest.fixture
def spark(engine: str, spark_of: Callable[[str], SparkSession]) -> SparkSession:
    """A session of `engine`."""
    return spark_of(engine)
