"""How Airflow is asked: what it cannot answer now is asked again, what it refuses is not."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import tenacity.nap

from jobs.local.client import AirflowClient, AirflowError, AirflowSilent

BUSY = httpx.Response(503, text="database is locked")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[AirflowClient, list[str]]]:
    """A client of a server that gives these answers, and the paths that were asked for."""
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)

    def client(*answers: httpx.Response | Exception) -> tuple[AirflowClient, list[str]]:
        left, paths = list(answers), []

        def answer(request: httpx.Request) -> httpx.Response:
            paths.append(request.url.path)
            found = left.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        made = AirflowClient("http://airflow")
        made._http = httpx.Client(base_url="http://airflow", transport=httpx.MockTransport(answer))
        return made, paths

    return client


def test_a_busy_server_is_asked_again(asked: Callable) -> None:
    ready = httpx.Response(200, json={"dags": []})
    client, paths = asked(BUSY, httpx.ConnectError("refused"), httpx.Response(200, text="<"), ready)
    assert client.request("GET", "/dags") == {"dags": []}
    assert paths == ["/api/v2/dags"] * 4


def test_a_server_that_stays_silent_is_said_to_be(asked: Callable) -> None:
    client, paths = asked(*[BUSY] * 9)
    with pytest.raises(AirflowSilent, match=r"did not answer GET /dags 5 times.*503.*is locked"):
        client.request("GET", "/dags")
    assert len(paths) == 5


def test_a_refusal_is_not_asked_again(asked: Callable) -> None:
    client, paths = asked(httpx.Response(409, text="active"))
    with pytest.raises(AirflowError, match="409: active") as refused:
        client.request("POST", "/backfills")
    assert refused.value.status == 409 and not isinstance(refused.value, AirflowSilent)
    assert len(paths) == 1
