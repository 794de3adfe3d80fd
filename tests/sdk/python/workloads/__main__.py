"""Runs a program and passes on what it says, by files in FOLDER; `collect` gathers that for the test."""

import json
import sys
import time
import traceback

from . import PROGRAMS, refused
from .ground import FOLDER, POLL_S, WAIT_S_MAX


def say(name, text):
    path = FOLDER / name
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def run(name):
    """Says after every step of the program how it went, and takes the next one when asked for it."""
    program = PROGRAMS[name]()
    cycle = 0
    while True:
        try:
            found = next(program)
            verdict = "ok" if found is None else str(found)
        except StopIteration:
            verdict = "ended"
        except BaseException as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            verdict = f"{type(error).__name__} in line {line}: {error}"
        say(f"{name}-{cycle}", verdict)
        if verdict == "ended":
            return
        cycle += 1
        while not ((FOLDER / f"ask-{cycle}").exists() or (FOLDER / f"ask-{cycle}-{name}").exists()):
            time.sleep(POLL_S)


def collect(cycle, names):
    """What the programs said in this cycle, once all have, as JSON."""
    deadline = time.monotonic() + 2 * WAIT_S_MAX
    said = {}
    for name in names:
        path = FOLDER / f"{name}-{cycle}"
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        said[name] = path.read_text() if path.exists() else f"nothing: {(FOLDER / f'{name}.log').read_text()[-1000:]}"
    print(json.dumps(said))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", name]:
            run(name)
        case ["collect", cycle, *names]:
            collect(int(cycle), names)
        case ["attempts"]:
            print(json.dumps(refused.attempts()))
