"""A process that has loaded the libraries of jobs, and forks for each command that it is sent.

    python dags/plugins/headwater_warm.py SOCKET [LIBRARY ...]

What a job imports (torch, TorchRec, MLflow, Great Expectations, the engine's client) takes up to ten
seconds of CPU; a fork takes none of it. Libraries only: this repository's code is read when a job
starts, so that a change counts from the next one on. Linux only.

SOCKET is a Unix socket that only its owner can open. A client sends one line of JSON (`_Command`) and
reads what the job prints; the last line is `_END` and its exit code, negative for a signal. A client
that says or hears no more ends its job. Every job has a process of its own that waits for it, so that
this one only accepts, and may die without one of them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import socketserver
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from setproctitle import getproctitle, setproctitle

# In the order in which the jobs of a first day want them.
LIBRARIES = (
    "pandas",
    "pyarrow.dataset",
    "deltalake",
    "pyspark.sql.connect.session",
    "great_expectations",
    "mlflow",
    "torch",
    "torchrec",
    "matplotlib.pyplot",
)
STOP_SECONDS = 15.0  # between asking a job to end and ending it
_END = "the job ended with "
_LONGEST = 2**20  # bytes of a command; an environment may hold 100 kB
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have this process end with the one that started it, however that ends (Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class _Command:
    """`python -m <module> <arguments>` in `folder`, with `environment` and nothing else of it."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    stop_seconds: float

    def run(self, output: int) -> None:
        """Become the job, in a process forked for it; what it prints goes to the descriptor `output`.

        Raises:
            SystemExit: as the module does.
        """
        die_with_parent()
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path[0] = self.folder
        sys.argv = ["-m", *self.arguments]
        setproctitle(" ".join(self.arguments))  # for `ps`, as far as it fits
        try:
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)
        finally:
            atexit._run_exitfuncs()  # multiprocessing leaves them out


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Accepts commands; `handle` of each runs in a process of its own."""

    request_queue_size = 64
    timeout = 0
    block_on_close = False


class _Keeper(socketserver.StreamRequestHandler):
    """Starts one job and waits for it, or for its client to go."""

    server: _Server

    def handle(self) -> None:
        """Run the command that the client sends, to its end."""
        self.server.socket.close()
        command = _Command(**json.loads(self.rfile.readline(_LONGEST)))
        job = get_context("fork").Process(target=command.run, args=(self.request.fileno(),))
        job.start()
        if job.sentinel not in wait([job.sentinel, self.request]):
            job.terminate()
            job.join(command.stop_seconds)
            if job.is_alive():
                job.kill()
        job.join()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(f"\n{_END}{job.exitcode}\n".encode())


def main() -> None:
    """Load the libraries, and fork until this process is killed. Commands are taken between two imports."""
    path = Path(sys.argv[1])
    getproctitle()  # finds the place while it is as the system left it
    os.chdir(path.parent)  # a socket's name has at most 107 bytes
    path.unlink(missing_ok=True)
    os.umask(0o077)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    with _Server(path.name, _Keeper) as server:
        for library in sys.argv[2:] or LIBRARIES:
            importlib.import_module(library)
            server.handle_request()
        gc.collect()
        gc.freeze()  # a collection in a fork does not copy what all share
        server.serve_forever()


class Forked:
    """A command that runs in a fork of the warm process at `path`.

    Args:
        command: the interpreter, "-m", a module and its arguments.
        environment: all of its environment.
        folder: where it runs.
        stop_seconds: between asking it to end and ending it.

    Raises:
        OSError: no warm process listens there.
    """

    def __init__(
        self,
        path: Path,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        self._code: int | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            self._socket.connect(f"/proc/self/fd/{parent}/{path.name}")
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(parent)
        asked = _Command(
            module=command[2],
            arguments=list(command[3:]),
            environment=dict(environment),
            folder=str(folder),
            stop_seconds=stop_seconds,
        )
        self._socket.sendall(json.dumps(asdict(asked)).encode() + b"\n")

    @staticmethod
    def can_run(command: Sequence[str]) -> bool:
        """Whether a fork can run it: a module, by this interpreter."""
        return list(command[:2]) == [sys.executable, "-m"] and len(command) > 2

    @property
    def stdout(self) -> Iterator[str]:
        """The lines that it prints, to its end."""
        with self._socket.makefile(errors="replace") as lines:
            for line in lines:
                if line.startswith(_END):
                    self._code = int(line.removeprefix(_END))
                    return
                yield line

    def wait(self) -> int:
        """Its exit code, negative for a signal, once `stdout` has been read.

        Raises:
            ConnectionError: whoever waited for it is gone, and it with them.
        """
        self._socket.close()
        if self._code is None:
            raise ConnectionError("the warm process that ran it is gone")
        return self._code

    def end(self) -> None:
        """End it, and wait until it has ended."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError, ConnectionError):
            for _ in self.stdout:
                pass
        self._socket.close()


if __name__ == "__main__":
    main()
