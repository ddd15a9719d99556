"""Apache Spark's needs: a Java that it runs on, the Delta JARs, and its Connect server's command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from jobs.paths import plain
from jobs.settings import REPOSITORY, Settings

MIN_JAVA = 17  # Apache Spark 4
# For many small queries on few cores. The fast compiler only: on 2 cores a small query took 1.1 s
# instead of 2.4 and a start 6 s of CPU instead of 9; at 2 M rows the first query is quicker still,
# later ones up to 1.4 times slower. Every query brings new classes: with that compiler's default code
# cache of 48 MB and the default collector, sweeping and concurrent marking took 20 of 47 s of CPU.
_JVM = (
    "-XX:TieredStopAtLevel=1",
    "-XX:ReservedCodeCacheSize=256m",
    "-XX:MetaspaceSize=512m",
    "-XX:+UseParallelGC",
)
_SCALA = "2.13"
_NEEDED = ("io.delta_", "io.unitycatalog_")  # of what Ivy brings; Spark has the rest itself
_SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"
_QUIET_LOG = """\
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{yyyy-MM-dd HH:mm:ss} %p %c{1}: %m%n%ex
"""


def java_home(env: Mapping[str, str] | None = None) -> str | None:
    """`JAVA_HOME` where it holds a `java`, else "" for a `java` on PATH; None where there is none."""
    env = os.environ if env is None else env
    home = env.get("JAVA_HOME", "")
    if home and os.access(Path(home) / "bin" / "java", os.X_OK):
        return home
    return "" if shutil.which("java", path=env.get("PATH", os.defpath)) else None


def java_version(env: Mapping[str, str] | None = None) -> int | None:
    """Major version of the Java that Spark would use (8, 11, 17, ...); None where none runs."""
    env = os.environ if env is None else env
    home = java_home(env)
    if home is None:
        return None
    java = (
        str(Path(home) / "bin" / "java")
        if home
        else shutil.which("java", path=env.get("PATH", os.defpath))
    )
    return _version_of(str(java))


@cache
def _version_of(java: str) -> int | None:
    try:
        # without perf data: it would be written to /tmp
        asked = subprocess.run(
            [java, "-XX:-UsePerfData", "-version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_java_version(asked.stderr + asked.stdout) if asked.returncode == 0 else None


def parse_java_version(text: str) -> int | None:
    """Major version in what `java -version` prints: `"17.0.15"`, `"21-ea"`, `"1.8.0_392"`."""
    found = re.search(r'version "(\d+)(?:\.(\d+))?', text)
    if found is None:
        return None
    major = int(found[1])
    return int(found[2]) if major == 1 and found[2] else major


def delta_package() -> str:
    """Maven coordinates of the Delta JAR that belongs to the installed Spark and delta-spark."""
    spark = ".".join(version("pyspark").split(".")[:2])
    return f"io.delta:delta-spark_{spark}_{_SCALA}:{version('delta-spark')}"


def delta_jars(folder: Path) -> list[Path]:
    """The JARs that `spark.jars` needs; empty where the set is not there or of another version."""
    return sorted(folder.glob("io.*.jar")) if (folder / _last_jar()).is_file() else []


def _last_jar() -> str:
    group, name, number = delta_package().split(":")
    return f"{group}_{name}-{number}.jar"


def resolve_jars(folder: Path) -> str:
    """Bring the Delta JARs into `folder` through Spark's own Ivy, once; a sentence that says what happened.

    Ivy works in a folder of its own, and the JAR that `delta_jars` looks for is moved last, so that a
    set is either complete or absent.
    """
    if delta_jars(folder):
        return f"Delta JARs: {len(delta_jars(folder))} in {folder.name}/"
    java = java_version()
    if java is None or java < MIN_JAVA:
        found = "no Java" if java is None else f"Java {java}"
        return f"Delta JARs: not needed, {found} here and Apache Spark wants {MIN_JAVA} or newer; Sail will be used"
    ivy = plain(folder) / "ivy"
    ivy.mkdir(parents=True, exist_ok=True)
    script = ivy / "nothing.py"  # spark-submit resolves packages only for an application
    script.write_text("")
    command = [
        _spark_submit(), "--master", "local[1]", "--packages", delta_package(), "--conf", f"spark.jars.ivy={ivy}",
        "--conf", "spark.ui.enabled=false", str(script),
    ]  # fmt: skip
    log = folder / "ivy.log"
    with log.open("wb") as out:
        done = subprocess.run(
            command, env=java_env(ivy), stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    found_jars = [p for p in (ivy / "jars").glob("*.jar") if p.name.startswith(_NEEDED)]
    if done.returncode or not any(p.name == _last_jar() for p in found_jars):
        return f"Delta JARs: not resolved (see {folder.name}/ivy.log), so Sail will be used; try again with a network"
    for old in folder.glob("*.jar"):
        old.unlink()
    for jar in sorted(found_jars, key=lambda p: p.name == _last_jar()):
        jar.rename(folder / jar.name)
    shutil.rmtree(ivy)
    log.unlink()
    return f"Delta JARs: {len(found_jars)} resolved into {folder.name}/"


def _spark_home() -> Path:
    spec = find_spec("pyspark")
    assert spec is not None and spec.origin is not None, "pyspark is in setup.cfg"
    return Path(spec.origin).parent


def _spark_submit() -> str:
    return str(_spark_home() / "bin" / "spark-submit")


def java_env(scratch: Path) -> dict[str, str]:
    """The environment of a JVM (or Sail) that writes nowhere but under `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("SPARK_REMOTE", "SPARK_CONNECT_MODE_ENABLED", "JAVA_HOME")
    }
    home = java_home()
    if home:
        env["JAVA_HOME"] = home
    env |= {
        "SPARK_HOME": str(_spark_home()),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LAUNCHER_OPTS": "-XX:-UsePerfData",
        "SPARK_SUBMIT_OPTS": f"-XX:-UsePerfData -Djava.io.tmpdir={scratch}",
        "TMPDIR": str(scratch),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        # functions passed to mapInArrow are pickled by reference to our modules
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
        ),
    }
    return env


def server_command(
    settings: Settings, *, port: int, cores: int
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a Spark Connect server with Delta on loopback port `port`."""
    scratch = settings.spark_dir
    conf_dir = scratch / "conf"
    conf_dir.mkdir(parents=True, exist_ok=True)
    (conf_dir / "log4j2.properties").write_text(_QUIET_LOG)
    for name in ("tmp", "local", "warehouse"):
        (scratch / name).mkdir(exist_ok=True)
    java_options = " ".join(
        [
            "-XX:-UsePerfData",  # it would be written to /tmp
            *_JVM,
            f"-Djava.io.tmpdir={scratch}/tmp",
            f"-Dderby.system.home={scratch}",
            "-Duser.timezone=UTC",
        ]
    )
    conf = {
        "spark.master": f"local[{cores}]",
        "spark.app.name": "headwater",
        "spark.driver.memory": settings.spark_memory,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.extraJavaOptions": java_options,
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": str(port),
        "spark.jars": ",".join(map(str, delta_jars(plain(settings.jars)))),
        "spark.jars.ivy": str(scratch / "ivy"),
        "spark.local.dir": str(scratch / "local"),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.catalogImplementation": "in-memory",
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",
        # the defaults (200, 50) are made for clusters: on 2 cores a small write took 9 s instead of 2
        "spark.sql.shuffle.partitions": str(cores),
        "spark.databricks.delta.snapshotPartitions": "1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    command = [_spark_submit(), "--class", _SERVER]
    for key, value in conf.items():
        command += ["--conf", f"{key}={value}"]
    env = java_env(scratch / "tmp") | {"SPARK_CONF_DIR": str(conf_dir)}
    env.pop("SPARK_SUBMIT_OPTS")  # the same as driver.extraJavaOptions
    return command, env
