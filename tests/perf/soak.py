#!/usr/bin/env python3
"""200 pauses and resumes of one busy sandbox (`make soak`; another number as the argument): no failure, contents
identical, no growth of open files, mounts, processes and memory. Prints what each pause and resume took."""

import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "sdk/python"))
from server import Server  # noqa: E402
from soak import Busy, Held, assert_no_growth  # noqa: E402

WARM = 10


def main(cycles):
    server = Server().start()
    os.environ.update(server.environment())
    try:
        busy = Busy()
        print(f"a sandbox with {', '.join(busy.programs)} and a shell on a terminal", flush=True)
        if busy.without_redis:
            print(f"without redis, which could not be had: {busy.without_redis}")
        for number in range(1, cycles + 1):
            busy.cycle(number)
            if number == WARM:
                early = Held(server, busy.sandbox)
                print(f"after {number:3}: {early}", flush=True)
            elif number % 50 == 0:
                print(f"after {number:3}: {Held(server, busy.sandbox)}", flush=True)
        assert_no_growth(early, Held(server, busy.sandbox), cycles - WARM)
        for verb, took in busy.took.items():
            took = sorted(1000 * each for each in took)
            print(f"{verb:7} p50 {statistics.median(took):6.1f} ms   p99 {took[len(took) * 99 // 100]:6.1f} ms   max {took[-1]:6.1f} ms")
        busy.sandbox.kill()
        print(f"{cycles} cycles: 0 failures, nothing lost, nothing grew")
    finally:
        server.remove()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
