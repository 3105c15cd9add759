"""The device API as the `spaces` client speaks it, for programs that load it from inside a Space's pod.

Plain sockets, one connection a call, no dependencies. It stands before the program that uses it (`grant_load.py`,
`sustain_load.py`, `storm.py`), and both are one text:

    python -c "$(cat device_api.py grant_load.py)" < plan.json

The plan comes on standard input, because tokens do not belong into arguments; the result is one JSON object on standard
output.
"""

import json
import os
import random
import select
import signal
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

# Above the device API's own limit of an answer (45 s) no answer comes; below it a slow one is still a finding.
ANSWER_LIMIT_S = 50.0
# The operator learns of a new account through its watch; that takes milliseconds, and seconds after its start.
NEW_ACCOUNT_LIMIT_S = 10.0
# A worker that was killed is gone at once, unless the kernel is in trouble.
EXIT_LIMIT_S = 10.0
# More slots than any node has (16 cards with two halves); past it something else is wrong.
SLOTS_MAX = 64
# Descriptors of this program that a worker could inherit; it opens a few dozen.
DESCRIPTORS_MAX = 256
# Milliseconds of one nanosecond.
MS = 1e-6


class Failed(Exception):
    """The device API did something that a client does not survive. The text never holds a token."""


class Reader:
    """The reading side of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""

    def fill(self) -> None:
        data = self.connection.recv(65536)
        if not data:
            raise Failed("the device API closed the connection in the middle of an answer")
        self.buffer += data

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self.fill()
        found, self.buffer = self.buffer.split(mark, 1)
        return found

    def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self.fill()
        found, self.buffer = self.buffer[:count], self.buffer[count:]
        return found

    def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(first.split(" ", 2)[1]), headers

    def event(self) -> tuple[str, str]:
        """The next event of a queue stream: one HTTP chunk."""
        size = int(self.until(b"\r\n"), 16)
        if size == 0:
            raise Failed("the queue stream ended without a verdict")
        lines = self.exactly(size).decode().strip().splitlines()
        self.exactly(2)
        name = lines[0].removeprefix("event: ")
        data = lines[1].removeprefix("data: ") if len(lines) > 1 else ""
        return name, data


def send(address: tuple[str, int], path: str, query: dict[str, object]) -> Reader:
    """Opens a connection and sends one call on it; the headers are the client's."""
    connection = socket.create_connection(address, timeout=ANSWER_LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = (
        f"POST {path}?{urlencode(query)} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nContent-Length: 0\r\n"
        "Accept: */*\r\nAccept-Encoding: gzip, deflate, br\r\nConnection: keep-alive\r\nUser-Agent: spaceport-bench\r\n\r\n"
    )
    connection.sendall(head.encode())
    return Reader(connection)


def receive(reader: Reader) -> tuple[int, dict[str, str], bytes]:
    """The whole answer to a call that is not a queue stream."""
    status, headers = reader.head()
    body = reader.exactly(int(headers.get("content-length", "0")))
    reader.connection.close()
    return status, headers, body


class Scheduled:
    """A `/schedule` call: `grant` once it has one, `reader` of the queue stream while it waits."""

    def __init__(self, address: tuple[str, int], token: str, declared_s: int, size: str = "") -> None:
        query = {
            "cgroupPath": "/",
            # A function of its own for each call: no call finds the worker of the one before, which is another path.
            "taskId": random.getrandbits(46),
            "enableQueue": "true",
            "tokenVersion": 2,
            "durationSeconds": declared_s,
            "token": token,
        }
        if size:
            query["gpuSize"] = size
        self.grant: dict | None = None
        self.reader: Reader | None = None
        begin = time.perf_counter_ns()
        reader = send(address, "/schedule", query)
        status, headers = reader.head()
        self.status = status
        self.refusal = ""
        kind = headers.get("content-type", "")
        if status == 200 and "text/event-stream" in kind:
            self.reader = reader
            self.reason = headers.get("x-queuing-reason", "node")
            return
        body = reader.exactly(int(headers.get("content-length", "0")))
        self.milliseconds = (time.perf_counter_ns() - begin) * MS
        reader.connection.close()
        if status == 200:
            self.grant = json.loads(body)
        else:
            text = body[:200].decode(errors="replace")
            self.refusal = f"/schedule was answered with {status} {headers.get('x-approve-result', '')} {text}"

    def wait(self) -> int:
        """Waits for the verdict of the queue stream; gives the time at which it came, nanoseconds."""
        name, data = self.reader.event()
        # Bounded by the socket's timeout and the queue's own limit: each ping shows that the call still waits.
        while name == "ping":
            name, data = self.reader.event()
        came = time.perf_counter_ns()
        if name != "succeeded":
            raise Failed(f"a call that waited got the event {name}")
        self.grant = json.loads(data)
        self.reader.connection.close()
        self.reader = None
        return came


class Lease:
    """A granted call whose worker was let in: a forked child that called `/allow` and opened the device."""

    def __init__(self, address: tuple[str, int], grant: dict, account: int, life: tuple[int, int]) -> None:
        self.address = address
        self.token = grant["allowToken"]
        self.account = account
        self.pid = 0
        # Between the first two its clock begins, between the last two it ends.
        self.asked = time.monotonic()
        # `idle: true` with a task of its own for each call cannot be; without a worker there is nothing to do but release.
        if not grant["idle"]:
            self.pid = start_worker(address, self.token, life)
        self.allowed = time.monotonic()

    def release(self, fail: bool = False) -> Reader:
        self.released = time.monotonic()
        return send(self.address, "/release", {"allowToken": self.token, "fail": "true" if fail else "false"})

    def finish(self, release: Reader) -> None:
        status, _, body = receive(release)
        self.ended = time.monotonic()
        self.end_worker()
        if not 200 <= status < 300:
            raise Failed(f"/release was answered with {status} {body[:200].decode(errors='replace')}")

    def end_worker(self) -> None:
        if self.pid == 0:
            return
        worker = os.pidfd_open(self.pid)
        try:
            # It would be kept for reuse otherwise, and no later call may find it.
            os.kill(self.pid, signal.SIGKILL)
            if not select.select([worker], [], [], EXIT_LIMIT_S)[0]:
                raise Failed(f"the worker did not end within {EXIT_LIMIT_S:.0f} s of its SIGKILL")
            os.waitpid(self.pid, 0)
            self.pid = 0
        finally:
            os.close(worker)


def start_worker(address: tuple[str, int], token: str, life: tuple[int, int]) -> int:
    """Forks the worker and waits until it was let in. It ends with its parent: `life` closes with it."""
    report, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # Sockets that stay open here would look like clients that have not left.
            low, high = sorted((answer, life[0]))
            for begin, end in ((0, low), (low + 1, high), (high + 1, DESCRIPTORS_MAX)):
                os.closerange(begin, end)
            status, _, _ = receive(send(address, "/allow", {"allowToken": token, "pid": os.getpid()}))
            if status == 200:
                open_device()
            os.write(answer, str(status).encode())
            os.close(answer)
            os.read(life[0], 1)
        finally:
            os._exit(0)
    os.close(answer)
    with open(report, "rb") as pipe:
        status = pipe.read()
    if status != b"200":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise Failed(f"/allow was answered with {status.decode() or 'nothing'}")
    return pid


def open_device() -> None:
    """Opens the card that the gate lets this process open, as CUDA does first: a lease that never does is reported."""
    for path in sorted(Path("/dev").glob("nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError:
            continue
        except OSError:
            # Let through by the gate; the stand-in has no driver behind it.
            pass
        return


def first(address: tuple[str, int], token: str, declared_s: int) -> Scheduled:
    """The first call of an account, which the operator may not know yet."""
    end = time.monotonic() + NEW_ACCOUNT_LIMIT_S
    while True:
        call = Scheduled(address, token, declared_s)
        if not call.refusal:
            return call
        if time.monotonic() > end:
            raise Failed(call.refusal)
        time.sleep(0.1)


def granted(call: Scheduled) -> str:
    """Waits for the grant of a call. Why it is none at once and with a worker of its own, or nothing."""
    if call.refusal:
        raise Failed(call.refusal)
    if call.reader:
        call.wait()
        return "queued"
    return "reused" if call.grant["idle"] else ""


class Told:
    """What a caller knows of the leases of one account, to be compared with its page and its receipts."""

    def __init__(self) -> None:
        # Ids of leases that must be settled, of leases that must cost nothing, and of leases that failed: both can be.
        self.leases: dict[str, list[str]] = {"settled": [], "free": [], "either": []}
        self.least_ms = 0
        self.most_ms = 0

    def settled(self, lease: Lease, declared_s: int, weight: int = 1) -> None:
        """A lease that ran from its `/allow` to its `/release`. Its end counts whole milliseconds: one more or less."""
        self.leases["settled"].append(lease.token)
        least = max(0, int((lease.released - lease.allowed) * 1000) - 1)
        self.least_ms += weight * min(least, declared_s * 1000)
        self.at_most(lease, declared_s, weight)

    def either(self, lease: Lease, declared_s: int, weight: int = 1) -> None:
        """A lease that failed: charged, or not if a platform fault was to blame or its worker never saw the device."""
        self.leases["either"].append(lease.token)
        self.at_most(lease, declared_s, weight)

    def free(self, token: str) -> None:
        """A lease that no worker was let into."""
        self.leases["free"].append(token)

    def at_most(self, lease: Lease, declared_s: int, weight: int) -> None:
        self.most_ms += weight * min(int((lease.ended - lease.asked) * 1000) + 2, declared_s * 1000)

    def json(self) -> dict:
        return {**self.leases, "least_ms": self.least_ms, "most_ms": self.most_ms}


def added(parts: list[dict]) -> dict:
    """What several callers of one account know together."""
    whole = {"settled": [], "free": [], "either": [], "least_ms": 0, "most_ms": 0}
    for part in parts:
        for name, value in part.items():
            whole[name] += value
    return whole


def in_processes(count: int, work) -> list[dict]:
    """`work(number)` in a process of its own each, all at once, so that none waits for another's interpreter."""
    pipes = []
    for number in range(count):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                answer = json.dumps(attempt(lambda: work(number))).encode()
                with open(writing, "wb") as pipe:
                    pipe.write(answer)
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        pipes.append((pid, reading))
    results = []
    for pid, reading in pipes:
        with open(reading, "rb") as pipe:
            results.append(json.loads(pipe.read() or b'{"failed": "a caller ended without a result"}'))
        os.waitpid(pid, 0)
    for result in results:
        if "failed" in result:
            raise Failed(result["failed"])
    return results


def abandon(lease: Lease) -> None:
    """Gives a lease back after a failure, if that still can be done; the failure is what will be told."""
    try:
        lease.finish(lease.release())
    except (Failed, OSError):
        pass


def attempt(work) -> dict:
    """The result, or how it failed."""
    try:
        return work()
    except Failed as failure:
        return {"failed": str(failure)}
    except OSError as error:
        # Its text names no token.
        return {"failed": f"{type(error).__name__}: {error}"}
