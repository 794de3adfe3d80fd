#!/usr/bin/env python3
"""Novita's numbers of docs/SPECIFICATION.md: clones with the parent's standstill, idle timeout, cadence of the metrics."""

import datetime
import itertools
import json
import os
import statistics
import sys
import time

from measure import REST_S, Api, Sandbox, Server, Verdicts, machine, show, timed
from stopped_time import all_answer, another, echo, ticking

SDK = {"User-Agent": "novita-sandbox-python-sdk/2.1.1"}
IDLE_S = 3
SAMPLED_S = 21


def ask(api, method, path, body=None, want=(200, 201, 204)):
    """A call as Novita's SDK makes it."""
    status, answer = api.call(method, path, body, SDK)
    if status not in want:
        raise RuntimeError(f"{method} {path} answered {status}: {answer[:300]}")
    return json.loads(answer) if answer else None


def clones(verdicts, api, rounds):
    print("\n== 8 clones of a bare running sandbox, all answering")
    parent = api.create()
    echo(parent)
    totals = [clone_all(api, parent) for _ in range(rounds)]
    parent.kill()
    verdicts.hold("8 clones, all answering", show("clone x 8 -> all answer", totals)["median"], 150, " ms")

    # Only a process inside can tell how long it stood still; that sandbox is not bare any more.
    parent = ticking(api)
    stills = []
    for _ in range(rounds):
        parent.run("/bin/touch", "/tmp/reset")
        clone_all(api, parent)
        stills.append(float(parent.run("/bin/cat", "/tmp/longest")))
    parent.kill()
    show("a parent's standstill, with a Python process in it", stills)


def clone_all(api, parent):
    """Seconds until eight copies have answered; they are ended afterwards."""

    def clone():
        made = ask(api, "POST", f"/sandboxes/{parent.id}/clone", {"count": 8, "strict": True, "timeout": 600})
        copies = [Sandbox(another(api), clone["sandboxID"], clone["envdAccessToken"]) for clone in made["sandboxes"]]
        all_answer(copies)
        return copies, made["snapshotTemplateId"]

    time.sleep(REST_S)
    seconds, (copies, template) = timed(clone)
    for copy in copies:
        copy.kill()
    ask(api, "DELETE", f"/templates/{template}")
    return seconds


def cadence(verdicts, api):
    """The steps between the samples of one sandbox, by the samples' own times."""
    print(f"\n== metrics, {SAMPLED_S} s of them")
    sandbox = api.create()
    time.sleep(SAMPLED_S)
    points = ask(api, "GET", f"/sandboxes/{sandbox.id}/metrics")
    sandbox.kill()
    times = [datetime.datetime.fromisoformat(point["timestamp"]).timestamp() for point in points]
    # The first point is the one at the start, out of step.
    steps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    print(f"  {len(points)} points, steps of {min(steps):.3f} to {max(steps):.3f} s, median {statistics.median(steps):.3f} s")
    verdicts.hold("farthest from 2 s", max(abs(step - 2) for step in steps), 0.2, " s")
    verdicts.hold("points missing", SAMPLED_S // 2 - len(points), 0)


def idleness(verdicts, api, rounds):
    """From a command's end to the sandbox's, less the idle timeout. Looking at it is no use of it."""
    print(f"\n== an idle timeout of {IDLE_S} s")
    late = []
    for _ in range(rounds):
        sandbox = api.create(metadata={"idle_timeout": str(IDLE_S)}, headers=SDK)
        echo(sandbox)
        started = time.perf_counter()
        while api.call("GET", f"/sandboxes/{sandbox.id}", headers=SDK)[0] == 200:
            time.sleep(0.01)
        late.append(time.perf_counter() - started - IDLE_S)
    show("idle timeout -> gone, later than asked for", late)
    verdicts.hold("latest", max(late), 2, " s")
    verdicts.hold("earliest before its time", -min(late), 0.1, " s")


def main():
    print(machine())
    rounds = int(os.environ.get("ROUNDS", "5"))
    verdicts = Verdicts()
    server = Server(**{"sandbox.running_max": "64", "novita.idle_timeout_min": "1 s"}).start()
    try:
        api = Api(server)
        server.wait_for_dump("base")
        clones(verdicts, api, rounds)
        idleness(verdicts, api, rounds)
        cadence(verdicts, api)
    finally:
        server.remove()
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
