"""What every benchmark needs: a server, a thin HTTP client, medians with their spread, and the name of the machine."""

import base64
import http.client
import json
import os
import pathlib
import platform
import statistics
import struct
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "sdk/python"))
from server import Server  # noqa: E402  (the SDK tests' server is the same one)


# Until what a rush used up is made again: roots and slots.
REST_S = 1.5


class Api:
    """The control plane and the agents behind the proxy over kept-alive connections, without an SDK's own cost."""

    def __init__(self, server):
        self.port = server.port
        self.key = server.environment()["E2B_API_KEY"]
        self.connection = self._connect()

    def _connect(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.connect()
        import socket

        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def call(self, method, path, body=None, headers=None):
        data = None if body is None else json.dumps(body).encode() if not isinstance(body, bytes) else body
        headers = {"X-API-KEY": self.key, "Content-Type": "application/json", **(headers or {})}
        for attempt in (1, 2):
            try:
                self.connection.request(method, path, body=data, headers=headers)
                answer = self.connection.getresponse()
                return answer.status, answer.read()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if attempt == 2:
                    raise
                self.connection = self._connect()

    def create(self, template="base", timeout=600, headers=None, **more):
        status, body = self.call("POST", "/sandboxes", {"templateID": template, "timeout": timeout, "secure": True, **more}, headers)
        if status != 201:
            raise RuntimeError(f"create answered {status}: {body[:300]}")
        answer = json.loads(body)
        return Sandbox(self, answer["sandboxID"], answer["envdAccessToken"])


class Sandbox:
    def __init__(self, api, identity, token):
        self.api, self.id = api, identity
        self.headers = {
            "E2b-Sandbox-Id": identity,
            "E2b-Sandbox-Port": "49983",
            "X-Access-Token": token,
            "Connect-Protocol-Version": "1",
        }

    def run(self, *argv, check=True):
        """Runs argv without a shell; returns its standard output."""
        message = json.dumps({"process": {"cmd": argv[0], "args": list(argv[1:])}, "stdin": False}).encode()
        body = struct.pack(">BI", 0, len(message)) + message
        status, answer = self.api.call(
            "POST", "/process.Process/Start", body, {**self.headers, "Content-Type": "application/connect+json"}
        )
        if status != 200:
            raise RuntimeError(f"start answered {status}: {answer[:300]}")
        output, code = b"", None
        while answer:
            flags, length = struct.unpack(">BI", answer[:5])
            event, answer = json.loads(answer[5 : 5 + length]), answer[5 + length :]
            data = event.get("event", {}).get("data", {})
            output += base64.b64decode(data.get("stdout", ""))
            if "end" in event.get("event", {}):
                code = event["event"]["end"].get("exitCode", 0)
            if flags & 2 and "error" in event:
                raise RuntimeError(f"{argv}: {event['error']}")
        if check and code != 0:
            raise RuntimeError(f"{argv} ended with {code}: {output[:300]}")
        return output

    def control(self, method, verb, body=None, want=(200, 201, 204)):
        status, answer = self.api.call(method, f"/sandboxes/{self.id}{verb}", body)
        if status not in want:
            raise RuntimeError(f"{method} {verb} answered {status}: {answer[:300]}")
        return json.loads(answer) if answer else None

    def kill(self):
        self.control("DELETE", "")


def timed(work):
    """(seconds, result)"""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def summary(seconds):
    """Median, quartiles and 99th percentile in milliseconds."""
    ordered = sorted(s * 1000 for s in seconds)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "n": len(ordered),
        "min": ordered[0],
        "q1": quartiles[0],
        "median": statistics.median(ordered),
        "q3": quartiles[2],
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max": ordered[-1],
    }


def show(name, seconds):
    values = summary(seconds)
    print(
        f"{name:<58} median {values['median']:8.2f} ms   q1..q3 {values['q1']:.2f}..{values['q3']:.2f}"
        f"   p99 {values['p99']:.2f}   min {values['min']:.2f}   n {values['n']}   load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return values


def cpu_ms(pid):
    """CPU time of a process and of its children that have ended, in milliseconds: what a loaded machine does not change."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return sum(int(ticks) for ticks in fields[11:15]) * 1000 / os.sysconf("SC_CLK_TCK")


def creates_in_a_row(api, rounds, create):
    """(seconds of each, failures, creates per second): one after the other, the one before killed after each."""
    row, failures, previous = [], 0, api.create()
    started = time.perf_counter()
    for _ in range(rounds):
        try:
            seconds, sandbox = timed(lambda: create(api))
        except RuntimeError as error:
            failures += 1
            print("failed:", error)
            continue
        row.append(seconds)
        previous.kill()
        previous = sandbox
    rate = rounds / (time.perf_counter() - started)
    previous.kill()
    return row, failures, rate


def with_memory(server, size):
    """The same server with more memory in the base template, before its first start."""
    server.take_layers()
    for path in (server.data_dir / "templates").glob("base-*.json"):
        manifest = json.loads(path.read_text())
        manifest["resources"]["memory"] = size
        path.unlink()  # a hard link: the other servers' template stays as it is
        path.write_text(json.dumps(manifest))
    return server


class Verdicts:
    """Promises next to what was measured; a broken one makes the run fail."""

    def __init__(self):
        self.broken = []

    def hold(self, promise, measured, limit, unit=""):
        kept = measured <= limit
        print(f"  {'kept  ' if kept else 'BROKEN'} {promise}: {measured:.3g}{unit} (at most {limit:.3g}{unit})", flush=True)
        if not kept:
            self.broken.append(promise)

    def exit_code(self):
        if self.broken:
            print(f"{len(self.broken)} promises broken: {'; '.join(self.broken)}")
        return 1 if self.broken else 0


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, load {load:.1f} at the start"


__all__ = ["Api", "Sandbox", "Server", "Verdicts", "cpu_ms", "creates_in_a_row", "machine", "show", "summary", "timed", "with_memory"]
