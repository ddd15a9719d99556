"""A port that is kept for a server: the server gets it, and nobody else."""

from __future__ import annotations

import asyncio

from jobs.local.services import free_port, held_port


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
