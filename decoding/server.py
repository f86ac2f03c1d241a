"""decoding/server.py: HTTP on 127.0.0.1 for one model, with a line in front of it.

    browsers     event loop, in a thread of its own              main thread: it loaded the model
    request ---> head, body, who asks? ---+--> call: a JSON value
                                          +--> job: a place in the line ------> its generator runs,
             <---- a line of JSON each <------- events <----------------------- one job at a time

A web site that the person visits can send requests to 127.0.0.1 as well. So Host and Origin must be
this server's own, a GET changes nothing, and bodies have types that forms cannot send. Every length
and every wait has a limit; what is over it is refused with one line of JSON, {"error": why}.

A job ends early when its browser closes the connection, or sends its ticket to /stop."""

import asyncio
import base64
import hashlib
import json
import os
import queue
import re
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import torch

from formats.errors import UserError
from formats.strict_json import loads

ADDRESS = "127.0.0.1"
MOST_HEAD, MOST_JSON, MOST_FILE = 16_384, 1_000_000, 64_000_000     # bytes of a request
MOST_BODIES = 200_000_000       # bytes of all bodies together, as far as they have come
GRACE, RATE = 5, 100_000        # a request may take GRACE seconds, and one more per RATE bytes
MOST_CONNECTIONS, MOST_WAITING = 200, 20
JSON, FILE, LINES = "application/json", "application/octet-stream", "application/x-ndjson"
REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found",
           405: "Method Not Allowed", 408: "Request Timeout", 410: "Gone", 411: "Length Required",
           413: "Content Too Large", 415: "Unsupported Media Type",
           431: "Request Header Fields Too Large", 503: "Service Unavailable"}
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class Refused(UserError):
    """A request that is not answered. status: HTTP's, one of REASONS."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Call(NamedTuple):
    """What a POST does. function(body): of JSON the object, of a file its bytes.

    job: it returns a generator function, which the main thread runs with the `Job`. thread: it
    takes long, so it runs beside the event loop, one at a time."""
    function: Callable
    kind: str = JSON
    job: bool = False
    thread: bool = False


class Job:
    """Something for the model to do. `work(job)` yields events, and ends when `stopped` is set."""

    def __init__(self, work):
        self.work, self.stopped = work, False
        self.ticket = secrets.token_urlsafe(16)     # nobody else can guess it
        self.events = asyncio.Queue()               # None: the end


# ------------------------------------------------------------------------------ one request

def parse_head(head):
    """The bytes of a request up to its empty line -> (method, path, {name: value})."""
    first, *lines = head.decode("latin-1")[:-4].split("\r\n")
    start = re.fullmatch(r"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.[01]", first)
    if not start:
        raise Refused(400, "the first line of the request is not HTTP/1.1")
    headers = {}
    for line in lines:
        found = re.fullmatch(r"([A-Za-z0-9_-]+):[ \t]*([\t -~\x80-\xff]*)", line)
        name = found[1].lower() if found else ""
        if not name or name in headers:             # two lengths or hosts: which one is meant?
            raise Refused(400, "a header that is malformed, or there twice")
        headers[name] = found[2].strip()
    return start[1], start[2], headers


def body_length(headers, kind):
    """Bytes of the body that these headers announce, of the type `kind`."""
    # a page of another site must ask before it sends these types, and gets no permission
    if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise Refused(415, f"the Content-Type must be {kind}")
    length, most = headers.get("content-length", ""), MOST_JSON if kind == JSON else MOST_FILE
    if not re.fullmatch("[0-9]{1,15}", length) or "transfer-encoding" in headers:
        raise Refused(411, "the request must give its Content-Length, and no Transfer-Encoding")
    if int(length) > most:
        raise Refused(413, f"{int(length):,} bytes are too many: at most {most:,} are read")
    return int(length)


def parse_object(body):
    """The JSON object in a body. Raises Refused."""
    try:
        value = loads(body.decode())
    except (ValueError, RecursionError) as error:   # UnicodeDecodeError is a ValueError
        raise Refused(400, f"unreadable JSON ({str(error)[:80]})") from None
    if type(value) is not dict:
        raise Refused(400, "the JSON must be an object")
    return value


def head_of(status, kind, *headers):
    """The bytes in front of an answer's body."""
    lines = (f"HTTP/1.1 {status} {REASONS[status]}", f"Content-Type: {kind}", "Connection: close",
             "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
             "Referrer-Policy: no-referrer", "Cross-Origin-Resource-Policy: same-origin", *headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(status, kind, body, *headers):
    return head_of(status, kind, f"Content-Length: {len(body)}", *headers) + body


def json_line(value):
    """Bytes, all ASCII: any character can be in a text."""
    return json.dumps(value).encode() + b"\n"


def html_page(html):
    """A page for `Server`: only the script and the style in it may run, and load nothing else."""
    script = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
             "img-src data: blob:; connect-src 'self' data:; base-uri 'none'; form-action 'none'; "
             "frame-ancestors 'none'")
    return "text/html; charset=utf-8", html.encode(), f"Content-Security-Policy: {rules}"


async def read_to_end(reader):
    """Returns when the other side has closed the connection; what it sends is thrown away."""
    try:
        while await reader.read(1 << 18):
            pass
    except ConnectionError:
        pass


# ------------------------------------------------------------------------------ all requests

def listen(port):
    """A socket on this port of this machine (0: one that is free). Raises UserError if another
    program has it."""
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        raise UserError(f"port {port}: {os.strerror(error.errno)}: choose another, or --port 0 for "
                        "one that is free") from None


class Server:
    """pages: {path: (Content-Type, bytes, headers)} of GET; calls: {path: `Call`} of POST."""

    def __init__(self, listening, pages, calls):
        """listening: of `listen`."""
        self.socket, self.port = listening, listening.getsockname()[1]
        self.pages = pages
        self.calls = {**calls, "/stop": Call(self.stop)}
        # by the rebinding of a name another site's page can reach this address, but not this Host
        self.hosts = (f"{ADDRESS}:{self.port}", f"localhost:{self.port}")
        self.jobs, self.line = queue.SimpleQueue(), []      # for the main thread; for the loop
        self.connections = self.bodies = 0                  # open; bytes of bodies in memory
        self.worker = ThreadPoolExecutor(1)
        self.loop = asyncio.new_event_loop()

    def run(self):
        """Answer until Ctrl-C. Jobs run in the thread that calls this."""
        threading.Thread(target=self.run_loop, daemon=True).start()
        while True:
            self.run_job(self.jobs.get())

    def run_loop(self):
        asyncio.set_event_loop(self.loop)
        start = asyncio.start_server(self.connected, sock=self.socket, limit=MOST_HEAD)
        self.loop.run_until_complete(start)
        self.loop.run_forever()

    def run_job(self, job):
        """One job from its first event to its last, in the main thread."""
        def send(event):
            self.loop.call_soon_threadsafe(job.events.put_nowait, event)
        try:
            if not job.stopped:
                for event in job.work(job):
                    send(event)
        except UserError as error:
            send({"error": " ".join(str(error).split())})
        except OUT_OF_MEMORY:
            send({"error": "out of memory: fewer pictures, or a shorter talk"})
        send(None)
        self.loop.call_soon_threadsafe(self.leave, job)

    def leave(self, job):
        """Take a job out of the line, and tell those behind it."""
        if job in self.line:
            place = self.line.index(job)
            del self.line[place]
            for n, other in enumerate(self.line[place:], place):
                other.events.put_nowait({"wait": n})

    def stop(self, request):
        """POST /stop: end the job of this ticket."""
        found = [job for job in self.line if job.ticket == request.get("ticket")]
        for job in found:
            job.stopped = True
        return {"stopped": len(found)}

    async def connected(self, reader, writer):
        """One connection: one request and its answer, or one line that says why not."""
        self.connections += 1
        try:
            await self.respond(reader, writer)
        except UserError as error:
            line = json_line({"error": " ".join(str(error).split())})
            writer.write(whole(getattr(error, "status", 400), JSON, line))
        except OUT_OF_MEMORY:
            writer.write(whole(503, JSON, json_line({"error": "out of memory: a smaller picture"})))
        except asyncio.TimeoutError:
            writer.write(whole(408, JSON, json_line({"error": "the request comes too slowly"})))
        except asyncio.LimitOverrunError:
            writer.write(whole(431, JSON, json_line({"error": "the headers are too long"})))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass                                    # nobody is there any more
        finally:
            await self.hang_up(reader, writer)
            self.connections -= 1

    async def hang_up(self, reader, writer):
        """Close so that the answer arrives: with bytes unread the other side would see an error."""
        try:
            await asyncio.wait_for(writer.drain(), GRACE)
            writer.write_eof()
            if self.connections <= MOST_CONNECTIONS:        # in a flood nobody is waited for
                await asyncio.wait_for(read_to_end(reader), 1)
        except (asyncio.TimeoutError, OSError):
            pass
        writer.close()

    def check_sender(self, headers):
        """Raises Refused unless the request comes from this server's own page, or no page."""
        host, own = headers.get("host", ""), f"http://{headers.get('host')}"
        if host not in self.hosts:
            raise Refused(403, f"this page is http://{self.hosts[0]} and answers to no other Host "
                          "(through ssh, forward the same port)")
        if headers.get("origin", own) != own:
            raise Refused(403, "another site may not use this page")

    async def respond(self, reader, writer):
        """Read a request and answer it. Raises UserError, TimeoutError, LimitOverrunError."""
        if self.connections > MOST_CONNECTIONS:
            raise Refused(503, "too many connections: try again")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), GRACE)
        method, path, headers = parse_head(head)
        self.check_sender(headers)
        if path not in self.pages and path not in self.calls:
            raise Refused(404, "there is no such page")
        if method != ("GET" if path in self.pages else "POST"):
            raise Refused(405, "this page is not asked for in this way")
        if path in self.pages:
            kind, body, *more = self.pages[path]
            writer.write(whole(200, kind, body, *more))
            return
        call = self.calls[path]
        body, length = bytearray(), body_length(headers, call.kind)
        try:
            await self.read_body(reader, body, length)
            value = parse_object(body) if call.kind == JSON else bytes(body)
            if call.thread:
                value = await self.loop.run_in_executor(self.worker, call.function, value)
            else:
                value = call.function(value)
        finally:
            self.bodies -= len(body)
        if call.job:
            await self.stream(reader, writer, Job(value))
        else:
            writer.write(whole(200, JSON, json_line(value)))

    async def read_body(self, reader, body, length):
        """Fill `body`. Raises Refused where it ends early, TimeoutError where it is slow."""
        start = time.monotonic()
        while len(body) < length:
            left = start + GRACE + len(body) / RATE - time.monotonic()
            chunk = await asyncio.wait_for(reader.read(min(length - len(body), 1 << 18)), left)
            if not chunk:
                raise Refused(400, "the body is shorter than its Content-Length")
            body += chunk
            self.bodies += len(chunk)               # `respond` takes them off again
            if self.bodies > MOST_BODIES and length > MOST_JSON:
                raise Refused(503, "others are sending large files: try again")

    async def stream(self, reader, writer, job):
        """Put a job into the line and send its events, until it ends or the browser is gone."""
        if len(self.line) >= MOST_WAITING:
            raise Refused(503, f"{MOST_WAITING} others are waiting: try again")
        writer.write(head_of(200, LINES))

        async def send_events():
            event = {"ticket": job.ticket, "wait": len(self.line) - 1}
            while event is not None:
                writer.write(json_line(event))
                await writer.drain()                # a browser that does not read waits for itself
                event = await job.events.get()
        self.line.append(job)
        self.jobs.put(job)
        tasks = [self.loop.create_task(send_events()), self.loop.create_task(read_to_end(reader))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()                       # raises what it raised
        finally:
            job.stopped = True
            self.leave(job)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)               # one coroutine at a time may read
