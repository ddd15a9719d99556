"""How long a Spark Connect client goes on asking an engine that does not answer.

The client's own policy asks 15 times within ten minutes, in each call and once more in closing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from pyspark.sql.connect.client.retries import DefaultPolicy

from jobs.spark import EngineLost, Server

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_TRIES = 8  # 0.05, 0.2, 0.8, 3.2, 12.8, 15, 15, 15 s apart: a minute in all
_MAX_WAIT_MS = 15_000


class Patience(DefaultPolicy):
    """A minute for an engine that may come back, nothing for a local server that has ended.

    Args:
        server: the local server that is asked; None for a cluster.

    Raises:
        EngineLost: out of whatever call the client was in, once the server's process is gone.
    """

    def __init__(self, server: Server | None) -> None:
        super().__init__(
            max_retries=_TRIES, max_backoff=_MAX_WAIT_MS, max_server_retry_delay=_MAX_WAIT_MS
        )
        self._server = server

    def can_retry(self, e: BaseException) -> bool:
        """Whether to ask again after `e`."""
        if isinstance(e, grpc.RpcError) and self._server is not None and self._server.ended():
            raise EngineLost(
                f"the engine ({self._server.engine}, process {self._server.pid}) ended in the middle "
                "of the job, killed or out of memory: run the same command again, it starts a new one"
            ) from e
        return super().can_retry(e)


def end(session: SparkSession) -> None:
    """End a session. An engine that does not answer is not asked twice."""
    session.client.set_retry_policies([])
    session.stop()
