"""kill -9 of CRIU in the middle of a dump, at any moment, alone or with its helper: the sandbox goes on as it was, and tells
so itself."""

import collections
import glob
import json
import os
import pathlib
import random
import signal
import time

import pytest
from e2b import Sandbox
from test_crashes import Hunter, api, arguments, attempt, children, crashing, name, tidy_up, until  # noqa: F401

# Threads that compute, processes that count, a connection between two threads that is never at rest: each says what it
# finds that cannot be. What a dump leaves in a process shows in its maps, descriptors and blocked signals.
WITNESS = r"""
import http.server, json, math, os, re, signal, socket, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
wrong, counts = [], {}
def watched(name, work):
    def run():
        try:
            for _ in work():
                counts[name] = counts.get(name, 0) + 1
        except BaseException as error:
            wrong.append(f'{name}: {error!r}')
    threading.Thread(target=run, daemon=True).start()
def compute():
    expected = sum(math.sqrt(each) * 1.5 for each in range(300))
    while True:
        assert sum(math.sqrt(each) * 1.5 for each in range(300)) == expected, 'another sum'
        time.sleep(0.001)
        yield
for number in range(3):
    watched(f'compute {number}', compute)
listener = socket.create_server(('127.0.0.1', 0))
near = socket.create_connection(listener.getsockname()); far, _ = listener.accept()
def send():
    number = 0
    while True:
        number += 1
        near.sendall(number.to_bytes(8, 'big')); time.sleep(0.0003)
        yield
def receive():
    expected = 0
    while True:
        got = b''
        while len(got) < 8:
            more = far.recv(8 - len(got))
            assert more, 'the connection ended'
            got += more
        expected += 1
        assert int.from_bytes(got, 'big') == expected, 'another number'
        yield
watched('send', send); watched('receive', receive)
ends = []
for _ in range(2):
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        while theirs.recv(1):
            theirs.send(b'!'); time.sleep(0.001)
        os._exit(0)
    theirs.close(); ends.append(ours)
    def ask(ours=ours):
        while True:
            ours.send(b'?'); assert ours.recv(1) == b'!', 'no answer'
            yield
    watched(f'child {len(ends)}', ask)
def own(): return {'wrong': wrong, 'counts': dict(counts), 'pid': os.getpid()}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(own()).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(('127.0.0.1', 7100), Handler).serve_forever()
"""
ROUNDS = int(os.environ.get("STILLBOX_KILLED_DUMPS", "15"))
# How a kill is timed: so long after CRIU's start, after it is first seen inside a process, or after the tasks' images.
TIMINGS = ("start", "inside", "inside", "inside", "late")


def host_pids(sandbox_id):
    found = set()
    # One hierarchy on v2, several on v1. Those of others come and go meanwhile.
    for place in ("", "*/"):
        for listed in glob.glob(f"/sys/fs/cgroup/{place}stillbox-*/{sandbox_id}/cgroup.procs"):
            found |= {int(pid) for pid in read(listed).split() if pid != "0"}
    return sorted(found)


def read(path):
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


class Killer(Hunter):
    """Kills the CRIU of the next dump at the moment that it is given."""

    def __init__(self, server, victims, timing, after_s, is_helper_killed):
        super().__init__(server)
        self.victims, self.timing, self.after_s = victims, timing, after_s
        self.is_helper_killed = is_helper_killed

    def criu(self):
        for helper in children(self.server):
            if name(helper) == "sb-dump":
                for each in children(helper):
                    if "swrk" in arguments(each):
                        return helper, each
        return None, None

    def is_time(self, since):
        if self.timing == "inside":
            return any("CRIUMFD" in read(f"/proc/{pid}/maps") for pid in self.victims) or time.monotonic() - since > 0.1
        return True

    def run(self):
        while not self.over.is_set():
            helper, pid = self.criu()
            if pid is None:
                continue
            try:
                pidfd = os.pidfd_open(pid)
                since = time.monotonic()
                while not self.is_time(since):
                    pass
                until_then = time.monotonic() + self.after_s
                while time.monotonic() < until_then:
                    pass
                if self.is_helper_killed:
                    os.kill(helper, signal.SIGKILL)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
                self.killed = True
            except OSError:
                pass  # It had ended.
            return


class Witness:
    def __init__(self):
        self.sandbox = Sandbox.create(timeout=1800)
        self.sandbox.files.write("/tmp/witness.py", WITNESS)
        self.sandbox.commands.run("setsid python3 /tmp/witness.py </dev/null >/tmp/witness.log 2>&1 &")
        first = until(self.ask, "the witness")
        self.pid = first["pid"]
        time.sleep(0.3)
        self.pids = host_pids(self.sandbox.sandbox_id)
        self.before = {pid: self.traces(pid) for pid in self.pids}

    def resume(self):
        self.sandbox.connect(timeout=1800)
        self.pids = host_pids(self.sandbox.sandbox_id)
        self.before = {pid: self.traces(pid) for pid in self.pids}

    def ask(self):
        said = self.sandbox.commands.run("curl -s http://127.0.0.1:7100/ || cat /tmp/witness.log >&2").stdout
        return json.loads(said) if said else None

    @staticmethod
    def traces(pid):
        """What a dump may have left in a process: its blocked signals, where it maps CRIU's code, its descriptors."""
        blocked = sorted(read(each).split("SigBlk:")[1].split()[0] for each in glob.glob(f"/proc/{pid}/task/*/status"))
        files = [os.readlink(each) for each in pathlib.Path(f"/proc/{pid}/fd").iterdir()]
        foreign = [line for line in read(f"/proc/{pid}/maps").splitlines() if "CRIUMFD" in line]
        foreign += [name for name in files if "CRIUMFD" in name or name.endswith("dump.log")]
        return blocked, foreign, pathlib.Path(f"/proc/{pid}/comm").read_text()

    def check(self, what, is_connection_lost=False):
        """`is_connection_lost`: the two ends of the connection may have met an error, and count no more."""
        def is_wrong(said):
            return [each for each in said["wrong"] if not (is_connection_lost and each.startswith(("send", "receive")))]
        first = self.ask()
        assert first and not is_wrong(first) and first["pid"] == self.pid, f"{what}: {first}"
        def goes_on():
            now = self.ask()
            assert not is_wrong(now), f"{what}: {now}"
            return all(now["counts"][name] > count for name, count in first["counts"].items() if not is_connection_lost or name not in ("send", "receive"))
        until(goes_on, f"all to go on after {what}: {first}")
        # The agent's threads come and go, and so do commands; the witness and its children stay as they were.
        for pid, (blocked, foreign, command) in self.before.items():
            if command.startswith("python3"):
                now = self.traces(pid)
                assert now[1] == [], f"{what}: {pid} {command}: {now[1]}"
                assert set(now[0]) <= set(blocked), f"{what}: {pid} {command} blocks {now[0]}, before {blocked}"


VERBS = {
    "fork": ("POST", "/fork", {"count": 1, "timeout": 300}),
    "pause": ("POST", "/pause", {}),
    "snapshot": ("POST", "/snapshots", {}),
}


def walk(server, rounds, seed, is_helper_killed):
    """Kills until as many kills as `rounds` have come in time. How the calls ended and where the sandbox was then."""
    witness = Witness()
    chance = random.Random(seed)
    outcomes = collections.Counter()
    for call in range(4 * rounds + 20):
        if outcomes.total() == rounds:
            break
        timing, verb = chance.choice(TIMINGS), chance.choice(list(VERBS))
        after_s = {"start": chance.uniform(0, 0.03), "inside": chance.uniform(0, 0.004), "late": chance.uniform(0.015, 0.05)}[timing]
        what = f"seed {seed}, kill {outcomes.total()}: {verb}, {timing} + {after_s * 1000:.2f} ms"
        method, rest, body = VERBS[verb]
        path = f"/sandboxes/{witness.sandbox.sandbox_id}"
        with Killer(server, witness.pids, timing, after_s, is_helper_killed) as killer:
            status, answer = attempt(server, method, path + rest, body)
        found, state = api(server, "GET", path)
        assert found == 200, f"{what}: lost: {state}, answered {status} {answer}"
        if killer.killed:
            is_failed = status >= 400 or "error" in json.dumps(answer)
            outcomes[f"{verb} {'failed' if is_failed else 'done'}, {state['state']}"] += 1
        if state["state"] == "paused":
            witness.resume()
        witness.check(f"{what}, answered {status} {answer}", is_connection_lost=is_helper_killed)
        tidy_up(server, witness)
    print(f"{outcomes.total()} kills{' with the helper' if is_helper_killed else ''}: {dict(outcomes)}, seed {seed}")
    assert outcomes.total() == rounds, f"only {outcomes.total()} kills in {call} calls"
    failed = sum(count for outcome, count in outcomes.items() if "failed" in outcome)
    assert failed > rounds / 3, f"most kills came too late: {outcomes}"
    # What was changed was undone: it can be dumped, and restored.
    witness.sandbox.pause()
    witness.resume()
    witness.check("the last resume", is_connection_lost=is_helper_killed)
    witness.sandbox.kill()


@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_criu_is_killed_in_the_middle_of_dumps(crashing):  # noqa: F811
    walk(crashing, ROUNDS, random.randrange(1 << 32), is_helper_killed=False)


@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_criu_and_its_helper_are_killed_together(crashing):  # noqa: F811
    """Nobody holds the tasks then until another helper comes: who uses a connection meanwhile may meet an error."""
    walk(crashing, max(5, ROUNDS // 3), random.randrange(1 << 32), is_helper_killed=True)
