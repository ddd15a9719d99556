"""Services are waited for, and a port that is kept for one is its and nobody else's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import tenacity.nap

from jobs.local import services as services_module
from jobs.local.services import AirflowServices, ServiceError, free_port, held_port


def test_a_held_port_is_the_servers_and_nobody_elses() -> None:
    with held_port() as held:
        port = held.getsockname()[1]
        assert free_port(port) != port

        async def serves() -> bytes:
            async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"here")
                writer.close()

            async with await asyncio.start_server(answer, "127.0.0.1", port):
                assert free_port(port) != port
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                found = await reader.read()
                writer.close()
                return found

        assert asyncio.run(serves()) == b"here"


def test_a_port_is_free_again_when_it_is_let_go() -> None:
    with held_port() as held:
        port = held.getsockname()[1]
    assert free_port(port) == port


def test_what_does_not_become_ready_is_given_up_and_a_service_that_ended_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)
    monkeypatch.setattr(services_module, "START_SECONDS", 0.05)
    services = AirflowServices(home=tmp_path)
    with pytest.raises(ServiceError, match=r"it is slow after 0\.05 s: see .*scheduler\.log"):
        services._until(lambda: False, "it is slow", "scheduler")
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    services._processes["scheduler"] = ended
    with pytest.raises(ServiceError, match="airflow scheduler ended with 3"):
        services._until(lambda: False, "it is slow", "scheduler")
