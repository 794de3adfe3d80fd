"""kill -9 of the server at each of its steps, of its helper and of CRIU in the middle of theirs: a sandbox ends up running
or paused, with memory and files of one moment, and nothing is left over."""

import http.client
import json
import os
import pathlib
import re
import signal
import threading
import time
import urllib.error

import pytest
import test_create
from e2b import Sandbox
from server import ROOT, Server

# Keeps the same count in memory and in a file: an older memory on newer files writes entries twice, a newer one on
# older files leaves some out.
LEDGER = r"""
import http.server, os, threading, time
ledger = open('/tmp/ledger', 'ab', buffering=0)
entries = 0
def keep():
    global entries
    while True:
        entries += 1
        ledger.write(b'%d\n' % entries)
        time.sleep(0.003)
threading.Thread(target=keep, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'%d %d' % (os.getpid(), entries)
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(('127.0.0.1', 7000), Handler).serve_forever()
"""
FAILPOINTS = re.findall(r'^ +"([a-z]+\.[a-z]+)",$', (ROOT / "src/sandbox/failpoints.rs").read_text(), re.M)
# When helper and CRIU are killed, in milliseconds after they began; both need some 10 to 30.
MOMENTS_MS = [0, 4, 9, 15, 24]


def until(condition, what, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what() if callable(what) else what}"
        time.sleep(0.05)
    return found


def api(server, method, path, body=None):
    # By name, or each call would ask the command line for the key.
    return test_create.api(server, method, path, body, key=os.environ["E2B_API_KEY"])


class Kept:
    """A sandbox with a ledger."""

    def __init__(self, server):
        self.server = server
        self.sandbox = Sandbox.create(timeout=1800)
        self.sandbox.files.write("/tmp/ledger.py", LEDGER)
        self.sandbox.commands.run("setsid python3 /tmp/ledger.py </dev/null >/tmp/ledger.log 2>&1 &")
        self.pid = until(self.ask, "the ledger")[0]

    def ask(self):
        said = self.sandbox.commands.run("curl -s http://127.0.0.1:7000/ || true").stdout
        return [int(each) for each in said.split()]

    def path(self, rest=""):
        return f"/sandboxes/{self.sandbox.sandbox_id}{rest}"

    def state(self):
        status, body = api(self.server, "GET", self.path())
        assert status == 200, f"lost: {status} {body}"
        return body["state"]

    def is_told_of_newer_files(self):
        _, body = api(self.server, "GET", f"/v2{self.path('/logs')}")
        return any("files are newer" in entry["message"] for entry in body["logs"])

    def check(self, what):
        """Its state, after which it runs; memory and files are of one moment unless it was said that they are not."""
        state = self.state()
        assert state in ("running", "paused"), f"{what}: {state}"
        self.sandbox.connect(timeout=1800)
        pid, entries = self.ask()
        lines = [int(line) for line in self.sandbox.files.read("/tmp/ledger").split()]
        assert pid == self.pid, f"{what}: the ledger was started anew"
        if lines != list(range(1, len(lines) + 1)):
            off = next((at, line) for at, line in enumerate(lines, 1) if at != line)
            assert self.is_told_of_newer_files(), f"{what}: memory and files are of two moments: entry {off[0]} says {off[1]}"
            return None
        assert len(lines) >= entries, f"{what}: {len(lines)} lines of {entries} entries"
        return state


@pytest.fixture(scope="module")
def crashing():
    before = dict(os.environ)
    server = Server().start()
    os.environ.update(server.environment())
    yield server
    server.remove()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def kept(crashing):
    """The sandbox that everything happens to; another one once its files are said to be newer."""
    known = []

    def current():
        if not known or known[-1].is_told_of_newer_files():
            if known:
                known[-1].sandbox.kill()
            known.append(Kept(crashing))
        return known[-1]

    yield current
    for each in known[-1:]:
        each.sandbox.kill()


def attempt(server, method, path, body=None):
    """A call whose server may die under it."""
    try:
        return api(server, method, path, body)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return None, None


def do(server, verb, kept):
    """Asks for the verb; what it makes beside the sandbox is removed by `tidy_up`."""
    if verb == "create":
        return attempt(server, "POST", "/sandboxes", {"templateID": "base", "timeout": 1800})
    method, rest, body = {
        "pause": ("POST", "/pause", {}),
        "resume": ("POST", "/connect", {"timeout": 1800}),
        "fork": ("POST", "/fork", {"count": 2, "timeout": 1800}),
        "snapshot": ("POST", "/snapshots", {}),
        "network": ("PUT", "/network", {"denyOut": ["192.0.2.0/24"]}),
        "kill": ("DELETE", "", None),
    }[verb]
    return attempt(server, method, kept.path(rest), body)


def tidy_up(server, kept):
    for listed in api(server, "GET", "/v2/sandboxes")[1]:
        if listed["sandboxID"] != kept.sandbox.sandbox_id:
            api(server, "DELETE", f"/sandboxes/{listed['sandboxID']}")
    for snapshot in api(server, "GET", "/snapshots")[1]:
        api(server, "DELETE", f"/templates/{snapshot['snapshotID'].replace('/', '%2F')}")


def verbs_of(point):
    return ["fork", "snapshot"] if point.startswith("copy.") else [point.split(".")[0]]


@pytest.mark.parametrize(("point", "verb"), [(point, verb) for point in FAILPOINTS for verb in verbs_of(point)])
def test_the_server_dies_at(crashing, kept, point, verb):
    subject = kept()
    if verb == "resume":
        subject.sandbox.pause()
    target = Kept(crashing) if verb == "kill" else subject
    crashing.stop()
    crashing.start(STILLBOX_FAILPOINT=point)
    status, body = do(crashing, verb, target)
    crashing.process.wait(timeout=30)
    assert status is None and crashing.process.returncode == -signal.SIGABRT, f"{point} was not met: {status} {body}"
    crashing.start()
    assert subject.check(point)
    if verb == "kill":
        assert not target.sandbox.is_running()
    if verb == "network":
        assert not api(crashing, "GET", subject.path())[1].get("network", {}).get("denyOut")
    tidy_up(crashing, subject)
    listed = {each["sandboxID"] for each in api(crashing, "GET", "/v2/sandboxes")[1]}
    assert listed <= {subject.sandbox.sandbox_id}
    left = [trace for trace in crashing.leftovers() if not any(each in trace for each in listed)]
    assert left == [], f"{point}: {left}"


class Hunter(threading.Thread):
    """Runs beside what it surrounds, until that is over; `killed` tells whether it met its moment."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server = server.process.pid
        self.over, self.killed = threading.Event(), False

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


class Killer(Hunter):
    """Kills the helper that the server runs for `operation`, or its CRIU, some time after that began."""

    def __init__(self, server, victim, operation, after_ms):
        super().__init__(server)
        self.victim, self.operation, self.after_ms = victim, operation, after_ms

    def run(self):
        while not self.over.is_set():
            for helper in children(self.server):
                if name(helper) == f"sb-{self.operation}":
                    found = [helper] if self.victim == "helper" else [each for each in children(helper) if "swrk" in arguments(each)]
                    if found:
                        return self.kill(found[0])
            time.sleep(0.0003)

    def kill(self, pid):
        try:
            pidfd = os.pidfd_open(pid)
            time.sleep(self.after_ms / 1000)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            self.killed = True
        except OSError:
            pass  # It had ended.


def children(pid):
    found = []
    try:
        for listed in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(each) for each in listed.read_text().split()]
    except OSError:
        pass  # It has ended.
    return found


def name(pid):
    """What a process calls itself; helpers are forks of one program, whose arguments they all show."""
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def arguments(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


WORKERS = [
    ("helper", "pause", "dump"),
    ("criu", "pause", "dump"),
    ("helper", "resume", "restore"),
    ("criu", "resume", "restore"),
    ("helper", "fork", "dump"),
    ("criu", "fork", "dump"),
    ("helper", "fork", "restore"),
    ("criu", "fork", "restore"),
    ("helper", "snapshot", "dump"),
    ("criu", "snapshot", "dump"),
]


@pytest.mark.parametrize(("victim", "verb", "operation"), WORKERS)
def test_its_worker_dies(crashing, kept, victim, verb, operation):
    killed, failed = 0, 0
    # On a busy machine the killer may come too late for all of them: then it has two more goes.
    for turn, moment in enumerate(3 * MOMENTS_MS):
        if turn >= len(MOMENTS_MS) and killed and failed:
            break
        subject = kept()
        if verb == "resume":
            subject.sandbox.pause()
        with Killer(crashing, victim, operation, moment) as killer:
            status, body = do(crashing, verb, subject)
        killed += killer.killed
        failed += status is not None and (status >= 400 or "error" in json.dumps(body))
        state = subject.check(f"{verb}, {victim} killed after {moment} ms, answered {status} {body}")
        if verb in ("fork", "snapshot"):
            assert state == "running", f"the source of a {verb} ended up {state}"
        tidy_up(crashing, subject)
    assert killed and failed, f"{victim} was killed {killed} times, {failed} calls failed"


def test_nothing_is_left_of_all_that(crashing, kept):
    subject = kept()
    subject.sandbox.kill()
    tidy_up(crashing, subject)
    until(lambda: crashing.leftovers() == [], lambda: f"the end of {crashing.leftovers()}")
    # The nursery stays, and roots are made ahead as slowly as others want the CPU. All else has ended; its status is taken soon.
    workers = lambda: [each for each in map(name, children(crashing.process.pid)) if each not in ("sb-nursery", "sb-prepare")]
    until(lambda: workers() == [], lambda: f"the end of {workers()}", seconds=8)
    crashing.cli("gc")
    dumps = lambda: [each.name for each in (crashing.data_dir / "snapshots").iterdir()]
    until(lambda: len(dumps()) <= 1, lambda: f"dumps to be removed, but the template's: {dumps()}")
    ours = str(crashing.data_dir)
    running = [link for link in pathlib.Path("/proc").glob("[0-9]*/exe") if ours in os.path.realpath(link) and "criu" in os.path.realpath(link)]
    assert running == []
