"""Fork warm Python processes on request; started by ``support.commands``, once per test worker.

Imports the heavy libraries once. For every request on standard input it forks a child that runs a
module or a program text just as a new interpreter would, without paying for the imports again.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "torchvision", "timm", "pyarrow.parquet", "tqdm", "extractor.api")


def next_request(server: socket.socket) -> dict[str, Any]:
    """Wait for a request; return it in a forked child that is set up as it says."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        size, descriptors, _, _ = socket.recv_fds(server, 4, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # wardens that are done
                pass
        if not size:
            os._exit(0)  # the test process has ended
        content = b""
        while len(content) < int.from_bytes(size, "big"):
            content += server.recv(1 << 20)
        if os.fork() == 0:
            server.close()
            request: dict[str, Any] = json.loads(content)
            _watch_child(descriptors)
            _become(request, descriptors[:3])
            return request
        for descriptor in descriptors:
            os.close(descriptor)


def _watch_child(descriptors: list[int]) -> None:
    """Fork again, and return in the child only; the parent reports its process id and its end."""
    status = descriptors[3]
    child = os.fork()
    if child == 0:
        os.close(status)
        return
    for descriptor in (0, 1, 2, *descriptors[:3]):
        os.close(descriptor)
    os.write(status, child.to_bytes(4, "big"))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(status, code.to_bytes(4, "big", signed=True))
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    for standard, descriptor in enumerate(streams):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    for standard in request["closed"]:
        os.close(standard)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    names = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
    for standard, (name, mode) in enumerate(names):
        is_open = standard not in request["closed"]
        setattr(sys, name, open(standard, mode, closefd=False) if is_open else None)  # noqa: SIM115
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
            custom = Path(folder, "sitecustomize.py")
            if custom.exists():
                runpy.run_path(str(custom))
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # read from the environment when it was imported
        importlib.reload(constants)


def _run(request: dict[str, Any]) -> int:
    """Run what is asked for; return the exit code, as an interpreter would."""
    sys.argv = ["-c", *request["arguments"]]
    try:
        if request["module"]:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _exit(code: int) -> None:
    """End the process without freeing every object of torch, which would take a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120
    os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # a garbage collection of a child copies no page of these objects
    _exit(_run(next_request(socket.socket(fileno=int(sys.argv[1])))))
