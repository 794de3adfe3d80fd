#!/usr/bin/env python3
"""The code interpreter's numbers of docs/SPECIFICATION.md: create to the first result, a cell over HTTP, memory."""

import json
import os
import pathlib
import sys

from measure import Api, Server, Verdicts, machine, show, timed

TEMPLATE = "code-interpreter"


def run_code(sandbox, code="1+1"):
    """The text of the cell's value, by E2B's wire."""
    headers = {**sandbox.headers, "E2b-Sandbox-Port": "49999"}
    status, body = sandbox.api.call("POST", "/execute", {"code": code}, headers)
    lines = [json.loads(line) for line in body.splitlines()]
    if status != 200 or any(line["type"] == "error" for line in lines):
        raise RuntimeError(f"/execute answered {status}: {body[:500]}")
    return next((line.get("text") for line in lines if line.get("is_main_result")), None)


def create_and_run(api):
    sandbox = api.create(TEMPLATE)
    if run_code(sandbox) != "2":
        raise RuntimeError("1+1 is something else here")
    return sandbox


def pss_mib(pid):
    return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:")) / 1024


def pss_of_tree(api):
    """Of all processes in a sandbox's cgroup."""
    sandbox = create_and_run(api)
    pids = set()
    for folder in pathlib.Path("/sys/fs/cgroup").rglob("cgroup.procs"):
        if sandbox.id in str(folder):
            pids |= {int(line) for line in folder.read_text().split()}
    total = sum(pss_mib(pid) for pid in pids)
    sandbox.kill()
    return total


def pauses_of_a_warm_kernel(api, verdicts):
    sandbox = create_and_run(api)
    pauses, cells = [], []
    for _ in range(15):
        pauses.append(timed(lambda: sandbox.control("POST", "/pause"))[0])
        cells.append(timed(lambda: (sandbox.control("POST", "/connect", {"timeout": 600}), run_code(sandbox)))[0])
    sandbox.kill()
    verdicts.hold("pause of a warm kernel", show("pause of a warm kernel", pauses)["median"], 150, " ms")
    verdicts.hold("its resume and a cell", show("its resume -> a cell's result", cells)["median"], 150, " ms")


def main():
    print(machine())
    rounds = int(os.environ.get("ROUNDS", "40"))
    verdicts = Verdicts()
    server = Server(templates=("base", TEMPLATE), **{"sandbox.running_max": "64"}).start()
    try:
        api = Api(server)
        server.wait_for_dump(TEMPLATE)
        create_and_run(api).kill()
        first = []
        for _ in range(rounds):
            seconds, sandbox = timed(lambda: create_and_run(api))
            first.append(seconds)
            sandbox.kill()
        pauses_of_a_warm_kernel(api, verdicts)
        values = show("create -> first run_code('1+1')", first)
        verdicts.hold("create -> first result", values["median"], 150, " ms")

        sandbox = create_and_run(api)
        values = show("one more cell over HTTP", [timed(lambda: run_code(sandbox))[0] for _ in range(rounds * 5)])
        verdicts.hold("a cell", values["median"], 4, " ms")
        for language, code in (("javascript", "1+1"), ("bash", "true")):
            run_in = lambda: sandbox.api.call("POST", "/execute", {"code": code, "language": language}, {**sandbox.headers, "E2b-Sandbox-Port": "49999"})  # noqa: B023, E731
            print(f"  first cell of {language}: {timed(run_in)[0] * 1000:.0f} ms")
            show(f"one more cell of {language}", [timed(run_in)[0] for _ in range(rounds)])
        sandbox.kill()
        verdicts.hold("agent and kernel after one cell", pss_of_tree(api), 90, " MiB PSS")
    finally:
        server.remove()
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
