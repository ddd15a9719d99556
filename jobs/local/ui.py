"""`make ui`: Airflow, MLflow and what runs left behind, served on loopback until Ctrl-C.

Airflow comes with its scheduler, so that a task cleared in its pages runs. Where `make run` is
going on, its Airflow is shown and the rest is served beside it. Airflow serves only its own pages: MLflow's
server and the reports are started here, so that one command shows them all and ends them.
"""

from __future__ import annotations

import functools
import html
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from feature_store import datasets
from jobs import failures
from jobs.local.plan import Plan
from jobs.local.run import DEVICES_POOL, device_slots, services_for
from jobs.local.services import AirflowServices, ServiceError, free_port, read_state
from jobs.paths import own
from jobs.settings import REPOSITORY, Settings

_MLFLOW_PORT, _FILES_PORT = 5000, 8081


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = None
    try:
        settings = Settings.from_env()
        serve(settings)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    except Exception as error:
        sys.exit(failures.report(error, settings))


def serve(settings: Settings) -> None:
    """Start everything, print the addresses and wait.

    Raises:
        ServiceError: a service does not start, or ended.
    """
    settings.make_folders()
    files = files_server(settings.home)
    mlflow = _mlflow(settings)
    services: AirflowServices | None = None
    try:
        print(f"Reports and Data Docs  http://127.0.0.1:{files.server_port}/", flush=True)
        if mlflow is not None:
            print(f"MLflow                 {mlflow[1]} (a few seconds)", flush=True)
        services = services_for(settings, None, settings.source, keep_waits=True)
        try:
            services.acquire()
        except ServiceError:
            services = None
            url = read_state(settings.airflow_home).get("url") or "starting; see the run's output"
            print(f"Airflow                {url} (of the run that is going on)", flush=True)
        if services is not None:
            _airflow(services)
            print(f"Airflow                {services.url}", flush=True)
        print("Ctrl-C ends them", flush=True)
        while True:
            time.sleep(2)
            if services is not None:
                services.check()
            if mlflow is not None and mlflow[0].poll() is not None:
                raise ServiceError(f"mlflow ended: see {settings.home / 'mlflow' / 'server.log'}")
    finally:
        files.shutdown()
        if mlflow is not None:
            _end(mlflow[0])
        if services is not None:
            services.stop()


def _airflow(services: AirflowServices) -> None:
    services.migrate()
    client = services.start_api()
    client.set_pool(
        DEVICES_POOL, device_slots(), "one slot per device: training and inference tasks"
    )
    plans = [Plan(datasets.get(name), ()) for name in datasets.names()]
    dag_ids = [dag_id for plan in plans for dag_id in plan.dag_ids]
    services.wait_parsed(client, dag_ids)
    services.clear_up(client, dag_ids)
    services.start_scheduler(client, dag_ids)
    client.close()


def _mlflow(settings: Settings) -> tuple[subprocess.Popen[bytes], str] | None:
    """MLflow's server over the store of `settings`; None where the store is somebody else's server."""
    if "://" in settings.mlflow_uri and not settings.mlflow_uri.startswith("sqlite"):
        print(f"MLflow                 {settings.mlflow_uri} (MLFLOW_TRACKING_URI)", flush=True)
        return None
    folder = settings.home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port(_MLFLOW_PORT)
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", settings.mlflow_uri,
        "--default-artifact-root", settings.mlflow_artifacts.as_uri(),
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
            start_new_session=True,
        )  # fmt: skip
    return process, f"http://127.0.0.1:{port}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def files_server(home: Path) -> http.server.ThreadingHTTPServer:
    """A running server, on loopback, of the reports and Data Docs in `home`."""
    handler = functools.partial(_Pages, directory=str(home))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port(_FILES_PORT)), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Pages(http.server.SimpleHTTPRequestHandler):
    """The folders `report` and `quality` under a home, and a page that lists them. Nothing else."""

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        """The page for `/`; what is outside of the two folders is not found."""
        inside = Path(self.translate_path(self.path)).relative_to(self.directory).parts
        if inside and inside[0] in ("report", "quality"):
            return super().send_head()
        if inside:
            self.send_error(404)
            return None
        body = index(Path(self.directory)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return io.BytesIO(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def index(home: Path) -> str:
    """A page with a link to each report and each dataset's Data Docs."""
    found = sorted(home.glob("report/*/index.html")) + sorted(home.glob("quality/*/**/index.html"))
    kept: dict[tuple[str, str], Path] = {}
    for path in sorted(found, key=lambda p: len(p.parts)):
        what, dataset = path.relative_to(home).parts[:2]
        kept.setdefault((what, dataset), path)
    names = {"report": "report", "quality": "Data Docs"}
    links = "".join(
        f'<li><a href="/{quote(str(path.relative_to(home)))}">{html.escape(dataset)}: {names[what]}</a></li>'
        for (what, dataset), path in sorted(kept.items())
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Headwater</title><h1>Headwater</h1>"
        f"<ul>{links or '<li>nothing yet: make run</li>'}</ul><p>{html.escape(own(str(home)))}, served from "
        f"{html.escape(str(REPOSITORY))}</p>"
    )


if __name__ == "__main__":
    main()
