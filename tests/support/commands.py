"""Child processes of Python that have torch imported already.

A new interpreter spends seconds on importing torch and timm. Here one process per test worker
imports them and forks for each command (``warm_server.py``): a process of its own, with its own
environment, streams, signals and exit code. Tests of what a new interpreter imports, or of how it
starts, use ``subprocess`` instead.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

SERVER = Path(__file__).with_name("warm_server.py")


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(SERVER), str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()

    def stop() -> None:
        ours.close()  # which ends it
        process.wait()

    atexit.register(stop)
    return ours


class WarmProcess:
    """A running child process, as ``subprocess.Popen`` has it.

    Args:
        arguments: ``["-c", CODE, ...]`` or ``["-m", MODULE, ...]``, as for ``python``.
        stdin, stdout, stderr: File descriptors. None closes the stream. By default nothing is read,
            and what is printed is kept for :meth:`output` and :meth:`errors`.
        cwd: Working folder.
        env: Environment; that of this process if None.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: int | None = -1,
        stdout: int | None = -1,
        stderr: int | None = -1,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        kind, program, *rest = arguments
        self._printed = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        with open(os.devnull, "rb") as nothing:
            defaults = [nothing.fileno(), *(file.fileno() for file in self._printed)]
            streams = [stdin, stdout, stderr]
            request = {
                "module": program if kind == "-m" else "",
                "code": program if kind == "-c" else "",
                "arguments": rest,
                "environment": dict(os.environ if env is None else env),
                "folder": str(cwd or Path.cwd()),
                "closed": [number for number, stream in enumerate(streams) if stream is None],
            }
            content = json.dumps(request).encode()
            self._status, theirs = os.pipe()
            used = [
                default if stream in (None, -1) else stream
                for stream, default in zip(streams, defaults, strict=True)
            ]
            socket.send_fds(_server(), [len(content).to_bytes(4, "big")], [*used, theirs])
            _server().sendall(content)
            os.close(theirs)
        self.pid = int.from_bytes(os.read(self._status, 4), "big")
        self.returncode: int | None = None

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.send_signal(signal.SIGKILL)
        self.wait()

    def poll(self) -> int | None:
        """Exit code, as ``subprocess`` counts it; None while the process runs."""
        return self._wait(0)

    def wait(self, timeout_seconds: float = 120) -> int:
        """Wait for the end, and return the exit code."""
        code = self._wait(timeout_seconds)
        if code is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired("a warm process", timeout_seconds)
        return code

    def _wait(self, timeout_seconds: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout_seconds)[0]:
            code = os.read(self._status, 4)
            os.close(self._status)
            assert code, "the server of warm processes has ended"
            self.returncode = int.from_bytes(code, "big", signed=True)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> str:
        """Text printed on standard output so far."""
        return self._text(0)

    def errors(self) -> str:
        """Text printed on standard error so far."""
        return self._text(1)

    def _text(self, which: int) -> str:
        self._printed[which].seek(0)
        return self._printed[which].read().decode()


def run_python(
    *arguments: str,
    stdin: int | None = -1,
    stdout: int | None = -1,
    stderr: int | None = -1,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run ``-c CODE`` or ``-m MODULE`` with arguments in a warm process to its end."""
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    process = WarmProcess(arguments, **streams, cwd=cwd, env=env)
    code = process.wait(timeout_seconds)
    return subprocess.CompletedProcess(arguments, code, process.output(), process.errors())


def run_extract(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command ``extract`` in a warm process to its end."""
    return run_python("-m", "extractor", *arguments, cwd=cwd, env=env)
