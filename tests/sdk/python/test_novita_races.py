"""Two dialects at once on one sandbox, and one sandbox's keys at another's door, by real SDKs on the real kernel."""

import concurrent.futures
import json
import random
import time
import urllib.error
import urllib.request

import e2b
from novita_common import api, bare, until
from novita_sandbox.core import Sandbox

ROUNDS = 6


def outcome(call):
    """What came of it: its value, or the text of what it raised."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def live(server):
    return {row["sandboxID"] for state in ("running", "paused") for row in api(server, "GET", f"/v2/sandboxes?state={state}")[1]}


def test_pause_clone_and_kill_at_once_leave_what_they_said_and_nothing_else(server):
    before = live(server)
    told = ("not found", "doesn't exist", "404", "409", "is being", "paused")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for round in range(ROUNDS):
            parent = Sandbox.create(timeout=60)
            same = e2b.Sandbox.connect(bare(parent.sandbox_id))
            calls = {
                "pause": lambda: same.pause(),
                "clone": lambda: list(Sandbox.clone(parent.sandbox_id, 2, strict=True)),
                "fork": lambda: same.fork(count=1),
                "kill": lambda: time.sleep(random.random() * 0.05 * round) or parent.kill(),
            }
            asked = {name: pool.submit(outcome, call) for name, call in calls.items()}
            came = {name: future.result(timeout=60) for name, future in asked.items()}
            assert came["kill"] is True, came
            for name in ("pause", "clone", "fork"):
                assert not isinstance(came[name], str) or any(word in came[name] for word in told), (name, came)
            copies = [made for name in ("clone", "fork") if isinstance(came[name], list) for made in came[name]]
            assert not isinstance(came["clone"], list) or len(came["clone"]) == 2, "strict: both or an error"
            # Whoever was answered has running copies; the parent is gone, and nobody else is there.
            for made in copies:
                assert made.commands.run("echo alive").stdout == "alive\n"
            assert live(server) - before == {bare(made.sandbox_id) for made in copies}, came
            for made in copies:
                made.kill()
    assert "not found" in outcome(lambda: Sandbox.clone(parent.sandbox_id, 1))


def test_a_clone_of_a_parent_that_is_dying_is_whole_or_not_found(server):
    """The kill comes while the copies are made."""
    before = live(server)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for delay in (0.0, 0.02, 0.05, 0.1):
            parent = Sandbox.create(timeout=60)
            asked = pool.submit(outcome, lambda: list(Sandbox.clone(parent.sandbox_id, 3, strict=True)))
            time.sleep(delay)
            assert parent.kill() is True
            came = asked.result(timeout=60)
            copies = came if isinstance(came, list) else []
            assert len(copies) == 3 or "not found" in came, (delay, came)
            assert live(server) - before == {bare(made.sandbox_id) for made in copies}, (delay, came)
            for made in copies:
                made.kill()
    until(lambda: live(server) == before, "nothing is left")


def test_another_sandboxs_token_opens_nothing(server):
    """Whichever way the request says where it goes: by host, by Novita's headers, by E2B's."""
    mine, other = Sandbox.create(timeout=60, secure=True), Sandbox.create(timeout=60, secure=True)
    other.files.write("/home/user/mine.txt", "private")
    key = {"X-Access-Token": mine._envd_access_token}
    url = f"http://127.0.0.1:{server.port}/files?path=/home/user/mine.txt"
    ways = (
        {"Novita-Sandbox-Id": bare(other.sandbox_id), "Novita-Sandbox-Port": "49983"},
        {"E2b-Sandbox-Id": bare(other.sandbox_id), "E2b-Sandbox-Port": "49983"},
        {"Host": f"49983-{bare(other.sandbox_id)}.stillbox.localhost"},
    )
    for way in ways:
        assert asked(url, {**way, **key}) == 401, way
        assert asked(url, way) == 401, way
        assert asked(url, {**way, "X-Access-Token": other._envd_access_token}) == "private", way
    # By the token alone it is one's own sandbox, which has no such file.
    assert asked(url, key) == 404
    mine.kill()
    other.kill()


def asked(url, headers):
    """The body, or the status of a refusal."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        json.loads(error.read())
        return error.code
