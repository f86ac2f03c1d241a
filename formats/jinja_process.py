"""The process that renders chat templates: one for the program, started when it is first needed.

    render -- a line of JSON --> formats/sandbox.py -- a line of JSON --> render

A template is somebody else's program. It may loop for ever: then the process ends itself after half
a second of computing, or is ended after SECONDS by the clock, and the next request starts a new
one. What it can reach, its time and its memory are bounded in formats/sandbox.py."""
import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SECONDS = 10.0                  # for one prompt, by the clock: the machine may be busy
START = 120.0                   # to start Python and import Jinja, on a busy machine
_LOCK = threading.Lock()


@functools.cache
def _process(pid):
    """formats/sandbox.py, started when it is first needed; it ends when the program `pid` does."""
    worker = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("sandbox.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(worker.kill)
    _line(worker.stdout, time.monotonic() + START)      # "ready"
    return worker


def _line(stream, deadline) -> bytes:
    """The next line of a pipe; cut short where the pipe ends or the time is over."""
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return line
        if not (more := os.read(stream.fileno(), 1 << 16)):
            return line
        line += more
    return line


def render(source: str, variables: dict) -> str:
    """What the template writes. Raises ValueError with the reason why it does not, TimeoutError
    where it takes too long."""
    request = json.dumps({"source": source, "variables": variables}) + "\n"
    with _LOCK:                             # one request at a time
        worker, line = _process(os.getpid()), b""
        deadline = time.monotonic() + SECONDS
        try:
            worker.stdin.write(request.encode())
            worker.stdin.flush()
            line = _line(worker.stdout, deadline)
        except BrokenPipeError:             # it has ended, so the line is not whole
            pass
        if not line.endswith(b"\n"):
            late = time.monotonic() >= deadline
            worker.kill()
            worker.communicate()
            _process.cache_clear()          # the next request starts a new process
            if late:
                raise TimeoutError(f"it takes over {SECONDS:.0f} s")
            if worker.returncode == -getattr(signal, "SIGPROF", 99):
                raise TimeoutError("it takes over half a second of computing")
            raise ValueError("the process that renders it came to an end")
    reply = json.loads(line)
    if "fault" in reply:
        raise ValueError(reply["fault"])
    return reply["text"]
