#!/usr/bin/env python3
"""Create, first command, exec, memory: the numbers of docs/SPECIFICATION.md, with runc as the peer in the same run."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from measure import REST_S, Api, Server, Verdicts, creates_in_a_row, machine, show, timed


class Runc:
    """`runc run` and `runc exec` on the layer that the sandboxes use."""

    def __init__(self, rootfs):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="stillbox-bench-runc-"))
        subprocess.run(["runc", "spec"], cwd=self.folder, check=True)
        spec = json.loads((self.folder / "config.json").read_text())
        spec["root"] = {"path": str(rootfs), "readonly": True}
        spec["process"]["terminal"] = False
        self.spec = spec

    def write(self, argv):
        self.spec["process"]["args"] = argv
        (self.folder / "config.json").write_text(json.dumps(self.spec))

    def run(self, name, argv):
        self.write(argv)
        return subprocess.run(["runc", "run", name], cwd=self.folder, check=True, capture_output=True).stdout

    def start(self, name):
        self.write(["sleep", "600"])
        subprocess.run(["runc", "run", "-d", name], cwd=self.folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def exec(self, name, argv):
        return subprocess.run(["runc", "exec", name, *argv], check=True, capture_output=True).stdout

    def remove(self, name):
        subprocess.run(["runc", "delete", "-f", name], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def create_and_run(api):
    sandbox = api.create()
    if sandbox.run("/bin/echo", "hello") != b"hello\n":
        raise RuntimeError("the first command printed something else")
    return sandbox


def rss_kib(pid):
    return next(int(line.split()[1]) for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS"))


def pss_kib(pid):
    return next(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))


def agent_pid(api, sandbox):
    """The host's pid of the process that is pid 1 of a sandbox."""
    return json.loads(api.call("GET", f"/stillbox/sandboxes/{sandbox.id}")[1])["initPid"]


def eight_at_once(verdicts, server, one, name):
    """Eight clients that meet a server at rest, five times over; `one` is what a create alone took."""
    together, last = [], []
    for _ in range(5):
        apis = [Api(server) for _ in range(8)]
        time.sleep(REST_S)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda each: timed(lambda: create_and_run(each)), apis))
        together += [seconds for seconds, _ in results]
        last.append(max(seconds for seconds, _ in results))
        for _, sandbox in results:
            sandbox.api = apis[0]
            sandbox.kill()
    eight = show(f"{name} -> first command's output, 8 at once", together)
    slowest = show("  the last of the eight", last)
    print(f"  the last of the eight / one alone: {slowest['median'] / one['median']:.2f}x")
    verdicts.hold(f"8 {name}s at once, each / one alone", eight["median"] / one["median"], 3, "x")


def cold(verdicts, rounds):
    print("\n== cold start (no dump is used), against runc run of the same layer")
    server = Server(**{"sandbox.running_max": "64", "sandbox.create_by": "cold-start"}).start()
    try:
        api = Api(server)
        layer = max((server.data_dir / "layers").iterdir(), key=lambda folder: folder.stat().st_mtime)
        runc = Runc(layer)
        create_and_run(api).kill()
        ours, peers = [], []
        for number in range(rounds):
            seconds, sandbox = timed(lambda: create_and_run(api))
            ours.append(seconds)
            sandbox.kill()
            seconds, _ = timed(lambda: runc.run(f"sb-bench-{os.getpid()}-{number}", ["/bin/echo", "hello"]))
            peers.append(seconds)
        mine, peer = show("create (cold) -> first command's output", ours), show("runc run /bin/echo", peers)
        verdicts.hold("cold create -> first output / runc run", mine["median"] / peer["median"], 2, "x")
        eight_at_once(verdicts, server, mine, "cold create")
        runc.remove("none")
    finally:
        server.remove()


def warm(verdicts, server, rounds):
    api = Api(server)
    print("\n== create")
    create_and_run(api).kill()
    alone = []
    for _ in range(min(rounds, 30)):
        seconds, sandbox = timed(lambda: create_and_run(api))
        alone.append(seconds)
        sandbox.kill()
    one = show("create -> first command's output, alone", alone)
    eight_at_once(verdicts, server, one, "create")

    row, failures, rate = creates_in_a_row(api, rounds, create_and_run)
    values = show(f"{rounds} creates in a row, one killed per create", row)
    print(f"  steady rate {rate:.1f} creates per second")
    verdicts.hold("failures", failures, 0)
    verdicts.hold("p99 / p50 of creates in a row", values["p99"] / values["median"], 3, "x")


def exec_latency(verdicts, server):
    print("\n== the same argv through the agent, against runc exec")
    api = Api(server)
    sandbox = api.create()
    layer = max((server.data_dir / "layers").iterdir(), key=lambda folder: folder.stat().st_mtime)
    runc, name = Runc(layer), f"sb-bench-exec-{os.getpid()}"
    runc.start(name)
    try:
        argv = ["/bin/echo", "hello"]
        ours = [timed(lambda: sandbox.run(*argv))[0] for _ in range(200)]
        login = [timed(lambda: sandbox.run("/bin/bash", "-l", "-c", "echo hello"))[0] for _ in range(30)]
        peers = [timed(lambda: runc.exec(name, argv))[0] for _ in range(30)]
        mine, peer = show("agent: /bin/echo hello", ours), show("runc exec /bin/echo hello", peers)
        show("agent: bash -l -c 'echo hello'", login)
        verdicts.hold("exec through the agent", mine["median"], 3, " ms")
        verdicts.hold("exec through the agent / runc exec", mine["median"] / peer["median"], 0.1, "x")
    finally:
        runc.remove(name)
        sandbox.kill()


def memory(verdicts, server):
    print("\n== memory with 20 sandboxes")
    api = Api(server)
    sandboxes = [api.create() for _ in range(20)]
    try:
        agents = [pss_kib(agent_pid(api, sandbox)) for sandbox in sandboxes]
        print(f"  {len(agents)} agents, PSS {min(agents)}..{max(agents)} KiB; server RSS {rss_kib(server.process.pid)} KiB")
        verdicts.hold("agent PSS", max(agents) / 1024, 4, " MiB")
        verdicts.hold("server RSS with 20 sandboxes", rss_kib(server.process.pid) / 1024, 40, " MiB")
    finally:
        for sandbox in sandboxes:
            sandbox.kill()


def main():
    print(machine())
    rounds = int(os.environ.get("ROUNDS", "200"))
    verdicts = Verdicts()
    cold(verdicts, min(rounds, 20))
    server = Server(**{"sandbox.running_max": "64"}).start()
    try:
        warm(verdicts, server, rounds)
        exec_latency(verdicts, server)
        memory(verdicts, server)
    finally:
        server.remove()
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
