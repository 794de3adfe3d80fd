#!/usr/bin/env python3
"""Pause, resume, fork, create from a dump: the numbers of docs/SPECIFICATION.md, through the HTTP API."""

import os
import sys
import threading
import time

from measure import REST_S, Api, Sandbox, Server, Verdicts, cpu_ms, creates_in_a_row, machine, show, timed, with_memory
from podman import NoPeer, Podman

# Ticks in memory; tells its longest pause between two ticks, which is how long it stood still.
TICKER = """
import os, time
last, longest = time.monotonic(), 0.0
open('/tmp/ready', 'w').close()
while True:
    time.sleep(0.001)
    now = time.monotonic()
    if os.path.exists('/tmp/reset'):
        os.unlink('/tmp/reset')
        longest = 0.0
    if now - last > longest:
        longest = now - last
        with open('/tmp/longest', 'w') as file:
            file.write(str(longest))
    last = now
"""

# Touches a number of MB, then checks every page when asked.
HOLDER = """
import http.server, os, sys
size = int(sys.argv[1]) << 20
memory = bytearray(os.urandom(1 << 20)) * (size >> 20)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        total = sum(memory[i] for i in range(0, size, 4096)) if self.path == '/all' else memory[0]
        body = str(total).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(('127.0.0.1', 7000), Handler).serve_forever()
"""


def background(sandbox, source, *arguments):
    """Starts a Python program and leaves it running."""
    sandbox.run("/bin/bash", "-c", f"cat > /tmp/program.py <<'END'\n{source}\nEND\nnohup python3 /tmp/program.py {' '.join(arguments)} >/dev/null 2>&1 &")


def echo(sandbox):
    if sandbox.run("/bin/echo", "on") != b"on\n":
        raise RuntimeError("a resumed sandbox printed something else")


def port(sandbox, path):
    status, body = sandbox.api.call("GET", path, headers={"E2b-Sandbox-Id": sandbox.id, "E2b-Sandbox-Port": "7000"})
    if status != 200:
        raise RuntimeError(f"port 7000 answered {status}: {body[:200]}")
    return body


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except RuntimeError:
            pass
        time.sleep(0.05)
    raise RuntimeError("a condition did not come about")


def pause_and_resume(verdicts, server, api, rounds):
    print("\n== a bare sandbox: pause, resume")
    sandbox = api.create()
    pauses, resumes = [], []
    for _ in range(rounds):
        pauses.append(timed(lambda: sandbox.control("POST", "/pause", {}))[0])

        def resume():
            sandbox.control("POST", "/connect", {"timeout": 600})
            echo(sandbox)

        resumes.append(timed(resume)[0])
    sandbox.kill()
    pause, resume = show("pause", pauses)["median"], show("resume -> first command's output", resumes)["median"]
    verdicts.hold("pause", pause, 30, " ms")
    verdicts.hold("resume -> first answer", resume, 30, " ms")
    try:
        checkpoint, restore = podman(server, rounds=10)
        print(f"  podman's medians over ours: {checkpoint / pause:.1f} x, {restore / resume:.1f} x")
    except NoPeer as reason:
        print(f"  without podman: {reason}")


def podman(server, rounds):
    """Medians of a checkpoint and of a restore with a first command, in milliseconds."""
    layer = next(folder for folder in (server.data_dir / "layers").iterdir() if (folder / "usr/bin/sleep").exists())
    criu = next((server.data_dir / "criu").glob("*/criu"))
    creates, checkpoints, restores = [], [], []
    with Podman(layer, criu) as peer:
        for _ in range(rounds):
            creates.append(timed(lambda: (peer.run(), peer.first_answer()))[0])
            checkpoints.append(timed(peer.checkpoint)[0])
            restores.append(timed(lambda: (peer.restore(), peer.first_answer()))[0])
            peer.remove()
        print(f"  the peer: podman on runc with {peer.criu}, a container with one process")
    show("podman run -> first command's output", creates)
    checkpoint, restore = show("podman container checkpoint", checkpoints), show("podman container restore -> first output", restores)
    return checkpoint["median"], restore["median"]


def creates(verdicts, server, api, rounds):
    print(f"\n== create from the template's dump, {rounds} back to back, one killed per create")
    spent = cpu_ms(server.process.pid)
    row, failures, rate = creates_in_a_row(api, rounds, first_command)
    spent = (cpu_ms(server.process.pid) - spent) / rounds
    values = show("create -> first command's output", row)
    pools = "8 roots, 8 slots (the defaults of config/stillbox.toml)"
    print(f"  steady rate {rate:.1f} per second, {spent:.1f} ms of CPU for a create, a command and a kill; pools: {pools}")
    verdicts.hold("create -> first command", values["median"], 30, " ms")
    verdicts.hold("p99 / median", values["p99"] / values["median"], 3, "x")
    verdicts.hold("failures", failures, 0)


def first_command(api):
    sandbox = api.create()
    echo(sandbox)
    return sandbox


def forks(verdicts, api):
    print("\n== 8 forks of a bare sandbox, all answering")
    source = api.create()
    echo(source)
    totals = [fork_all(api, source) for _ in range(8)]
    source.kill()
    verdicts.hold("8 forks, all answering", show("fork x 8 -> all answer", totals)["median"], 150, " ms")

    # Only a process inside can tell how long it stood still; that sandbox, and each of its copies, is not bare any more.
    source = ticking(api)
    totals, stills = [], []
    for _ in range(5):
        source.run("/bin/touch", "/tmp/reset")
        totals.append(fork_all(api, source))
        stills.append(float(source.run("/bin/cat", "/tmp/longest")))
    used = int(source.run("/bin/bash", "-c", "df -BM --output=used / | tail -1 | tr -dc 0-9"))
    source.kill()
    show("the same of one with a Python process that ticks", totals)
    values = show("its standstill", stills)
    verdicts.hold(f"standstill with {used} MB on its disk", values["median"], 40 + 2 * used, " ms")


def fork_all(api, source):
    """Seconds until eight copies have answered; they are ended afterwards."""

    def fork():
        entries = source.control("POST", "/fork", {"timeout": 600, "count": 8})
        copies = [Sandbox(another(api), entry["sandbox"]["sandboxID"], entry["sandbox"]["envdAccessToken"]) for entry in entries]
        all_answer(copies)
        return copies

    time.sleep(REST_S)
    seconds, copies = timed(fork)
    for copy in copies:
        copy.kill()
    return seconds


def all_answer(sandboxes):
    threads = [threading.Thread(target=echo, args=(sandbox,)) for sandbox in sandboxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ticking(api):
    """A sandbox with a process that notes the longest time for which it did not run."""
    sandbox = api.create()
    background(sandbox, TICKER)
    until(lambda: sandbox.run("/bin/ls", "/tmp/ready"))
    return sandbox


def another(api):
    """A connection of its own to the same server, for a thread."""
    copy = object.__new__(type(api))
    copy.port, copy.key = api.port, api.key
    copy.connection = copy._connect()
    return copy


def standstill_with_data(api):
    print("\n== standstill of a source with 1 GB on its disk (printed, no promise)")
    source = ticking(api)
    source.run("/bin/bash", "-c", "head -c 1G /dev/urandom > /home/user/data; sync")
    source.run("/bin/touch", "/tmp/reset")
    entries = source.control("POST", "/fork", {"timeout": 600, "count": 1})
    print(f"  stood still {float(source.run('/bin/cat', '/tmp/longest')) * 1000:.0f} ms")
    Sandbox(api, entries[0]["sandbox"]["sandboxID"], entries[0]["sandbox"]["envdAccessToken"]).kill()
    source.kill()


def much_memory(verdicts, api):
    print("\n== 1 GB of touched memory")
    sandbox = api.create("base")
    background(sandbox, HOLDER, "1024")
    until(lambda: port(sandbox, "/") is not None)
    total = port(sandbox, "/all")
    pauses, answers, reads = [], [], []
    for _ in range(3):
        pauses.append(timed(lambda: sandbox.control("POST", "/pause", {}))[0])
        started = time.perf_counter()
        sandbox.control("POST", "/connect", {"timeout": 600})
        port(sandbox, "/")
        answers.append(time.perf_counter() - started)
        if port(sandbox, "/all") != total:
            raise RuntimeError("the memory came back different")
        reads.append(time.perf_counter() - started)
    sandbox.kill()
    verdicts.hold("pause of 1 GB", show("pause", pauses)["median"], 600, " ms")
    verdicts.hold("resume -> first answer", show("resume -> first answer", answers)["median"], 100, " ms")
    verdicts.hold("resume -> all of it read", show("resume -> all of it read", reads)["median"], 800, " ms")


def main():
    print(machine())
    rounds = int(os.environ.get("ROUNDS", "500"))
    verdicts = Verdicts()
    # 1 GB of touched memory has to fit, in the sandbox as in the cgroup that it is restored in.
    server = with_memory(Server(**{"sandbox.running_max": "64"}), 2 << 30).start()
    try:
        api = Api(server)
        # The template's dump is made in the background after the first cold start; the promise is about what follows.
        first_command(api).kill()
        until(lambda: any((server.data_dir / "snapshots").iterdir()))
        pause_and_resume(verdicts, server, api, 30)
        creates(verdicts, server, api, rounds)
        forks(verdicts, api)
        standstill_with_data(api)
        much_memory(verdicts, api)
    finally:
        server.remove()
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
