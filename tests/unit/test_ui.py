"""The pages of `make ui`: reports and Data Docs are served, and nothing else of the home is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs.local.ui import files_server, index


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for path in ("report/simulated/index.html", "quality/globo/index.html", "airflow/airflow.cfg"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(path)
    return tmp_path


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    server = files_server(home)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_reports_and_data_docs_are_listed_and_served(address: str) -> None:
    page = httpx.get(address).text
    assert "simulated: report" in page and "globo: Data Docs" in page
    for path in ("report/simulated/index.html", "quality/globo/index.html"):
        assert path in page
        assert httpx.get(f"{address}/{path}").text == path


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path", ["/airflow/airflow.cfg", "/report/%2e%2e/airflow/airflow.cfg", "/airflow", "/nothing"]
)
def test_nothing_else_is_served(address: str, path: str, method: str) -> None:
    assert httpx.request(method, address + path).status_code == 404


def test_an_empty_home_says_what_to_do(tmp_path: Path) -> None:
    assert "make run" in index(tmp_path)
