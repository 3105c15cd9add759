"""Calls the device API from inside a Space's pod as the `spaces` client does, and measures what a call waits for.

    python -c "$(cat grant_load.py)" < plan.json

Plain sockets, one connection a call, no dependencies. The plan comes on standard input, because tokens do not belong into
arguments; the result is one JSON object on standard output. A plan:

    {"phase": "grant",        "grant": each token is a caller of its own, all at once
                              "handover": all slots are taken, one more waits, one of the first is released
     "address": ["127.0.0.1", 7999],
     "tokens": [...],         one an account
     "declared_s": 5,         what each call declares
     "pause_s": 0.04,         between two calls of one caller
     "warm_up": 20,           calls of each caller that are not measured
     "samples": 220,          calls of each caller that are
     "limit_s": 60}           no call is begun after that; what was measured until then is the result

"grant" measures from before the connection is opened until the whole 200 answer has come, of calls that found a free slot
and no worker of their own. "handover" measures from before the connection of `/release` is opened until the `succeeded`
event of the call that waited has come. Both include what the client does not measure: opening the connection.
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

    def __init__(self, address: tuple[str, int], token: str, declared_s: int) -> None:
        query = {
            "cgroupPath": "/",
            # A function of its own for each call: no call finds the worker of the one before, which is another path.
            "taskId": random.getrandbits(46),
            "enableQueue": "true",
            "tokenVersion": 2,
            "durationSeconds": declared_s,
            "token": token,
        }
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
        # `idle: true` with a task of its own for each call cannot be; without a worker there is nothing to do but release.
        if not grant["idle"]:
            self.pid = start_worker(address, self.token, life)

    def release(self) -> Reader:
        return send(self.address, "/release", {"allowToken": self.token, "fail": "false"})

    def finish(self, release: Reader) -> None:
        status, _, body = receive(release)
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
            for descriptor in range(DESCRIPTORS_MAX):
                if descriptor not in (answer, life[0]):
                    os.closerange(descriptor, descriptor + 1)
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


def call_once(plan: dict, account: int, life: tuple[int, int], is_first: bool) -> tuple[float | None, str]:
    """One whole call. The milliseconds until its grant, or none if it waited or found a worker, which `why` says."""
    address, token = tuple(plan["address"]), plan["tokens"][account]
    call = first(address, token, plan["declared_s"]) if is_first else Scheduled(address, token, plan["declared_s"])
    if call.refusal:
        raise Failed(call.refusal)
    why = ""
    if call.reader:
        why = "queued"
        call.wait()
    elif call.grant["idle"]:
        why = "reused"
    lease = Lease(address, call.grant, account, life)
    lease.finish(lease.release())
    return (None if why else call.milliseconds), why


def caller(plan: dict, account: int, end: float) -> dict:
    """One caller of the phase "grant": call after call, until there are enough samples."""
    life = os.pipe()
    result = {"milliseconds": [], "granted": 0, "queued": 0, "reused": 0, "begin": 0.0, "end": 0.0}
    wanted = plan["samples"]
    # Twice as many calls as samples: then most found no free slot, and the numbers would say nothing.
    for number in range(plan["warm_up"] + 2 * wanted):
        if len(result["milliseconds"]) >= wanted or time.monotonic() >= end:
            break
        measured = number >= plan["warm_up"]
        if measured and not result["begin"]:
            result["begin"] = time.monotonic()
        milliseconds, why = call_once(plan, account, life, is_first=number == 0)
        result["granted"] += 1
        if why:
            result[why] += 1
        elif measured:
            result["milliseconds"].append(milliseconds)
        result["end"] = time.monotonic()
        time.sleep(plan["pause_s"])
    return result


def grant(plan: dict, end: float) -> dict:
    """All callers at once, each a process of its own, so that none waits for another's interpreter."""
    pipes = []
    for account in range(len(plan["tokens"])):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                answer = json.dumps(attempt(lambda: caller(plan, account, end))).encode()
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
    measured = [result for result in results if result["begin"]]
    begin = min((result["begin"] for result in measured), default=0.0)
    last = max((result["end"] for result in measured), default=0.0)
    return {
        "milliseconds": [sample for result in results for sample in result["milliseconds"]],
        "granted": [result["granted"] for result in results],
        "queued": sum(result["queued"] for result in results),
        "reused": sum(result["reused"] for result in results),
        "seconds": last - begin,
        "slots": 0,
    }


def handover(plan: dict, end: float) -> dict:
    """Takes every slot; then, again and again: one call waits, the oldest lease is released, the call that waited has it."""
    address, tokens, declared_s = tuple(plan["address"]), plan["tokens"], plan["declared_s"]
    life = os.pipe()
    granted = [0] * len(tokens)
    held: list[Lease] = []
    samples: list[float] = []
    account = 0
    try:
        waiting = first(address, tokens[account], declared_s)
        while waiting.grant:
            if len(held) == SLOTS_MAX:
                raise Failed(f"{SLOTS_MAX} leases were granted and slots are still free")
            granted[account] += 1
            held.append(Lease(address, waiting.grant, account, life))
            account = (account + 1) % len(tokens)
            waiting = first(address, tokens[account], declared_s)
        slots = len(held)
        # Each round begins with one call that waits and ends with its grant.
        rounds = plan["warm_up"] + plan["samples"]
        for number in range(rounds):
            if waiting.reason != "node":
                raise Failed(f"a call waits for {waiting.reason}, not for a slot")
            # What came before (the settlement of the last lease, its receipt) shall be over.
            time.sleep(plan["pause_s"])
            oldest = held.pop(0)
            begin = time.perf_counter_ns()
            release = oldest.release()
            came = waiting.wait()
            if number >= plan["warm_up"]:
                samples.append((came - begin) * MS)
            granted[account] += 1
            held.append(Lease(address, waiting.grant, account, life))
            oldest.finish(release)
            if time.monotonic() >= end or number + 1 == rounds:
                break
            # Not the account whose lease is released next: its settlement would be in the way of the hold.
            account = (account + 1) % len(tokens)
            if account == held[0].account:
                account = (account + 1) % len(tokens)
            waiting = Scheduled(address, tokens[account], declared_s)
            if waiting.refusal:
                raise Failed(waiting.refusal)
            if waiting.grant:
                raise Failed("a slot was free although all were taken")
    except (Failed, OSError):
        for lease in held:
            abandon(lease)
        raise
    for lease in held:
        lease.finish(lease.release())
    return {"milliseconds": samples, "granted": granted, "queued": len(samples), "reused": 0, "seconds": 0.0, "slots": slots}


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


def main() -> int:
    plan = json.load(sys.stdin)
    end = time.monotonic() + plan["limit_s"]
    work = {"grant": grant, "handover": handover}[plan["phase"]]
    print(json.dumps(attempt(lambda: work(plan, end))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
