"""What survives a pause, and what is refused: the workload table of the checkpoint design, row by row.

The programs are in workloads/ and check themselves: each sets something up, and after each of two pauses says
`ok` or what it found instead. They share sandboxes, so that the table costs ten pauses and not seventy. Not here, since
the base template has none of them: ipykernel, tokio, Chromium, redis, tmux.
"""

import json
import pathlib
import time

import pytest
import workloads
from e2b import PtySize, Sandbox
from test_create import api

GUEST = pathlib.Path(workloads.__file__).parent
CYCLES = 2
# Programs that share a sandbox: a pause that fails points at few of them.
GROUP = 7


def guest(sandbox, *arguments, root=False):
    return sandbox.commands.run(f"{'sudo -n ' if root else ''}python3 -m workloads {' '.join(arguments)}", cwd="/tmp").stdout


def start(sandbox, names):
    """Starts the programs side by side; none of them is a child of a command that somebody follows."""
    lines = ["mkdir -p -m 777 /tmp/workloads-said /home/user/places; cd /tmp"]
    for name in names:
        sudo = "sudo -n " if name in workloads.AS_ROOT else ""
        lines.append(f"{sudo}setsid python3 -m workloads run {name} </dev/null >/tmp/workloads-said/{name}.log 2>&1 &")
    sandbox.commands.run("\n".join(lines))


def collect(sandbox, cycle, names):
    return json.loads(guest(sandbox, "collect", str(cycle), *names))


def make(timeout=120):
    sandbox = Sandbox.create(timeout=timeout)
    sandbox.files.write_files([{"path": f"/tmp/workloads/{each.name}", "data": each.read_text()} for each in GUEST.glob("*.py")])
    return sandbox


def cycles(names):
    """What each program said: before any pause, after the first, after the second."""
    sandbox = make()
    try:
        start(sandbox, names)
        rounds = [collect(sandbox, 0, names)]
        for cycle in range(1, CYCLES + 1):
            sandbox.pause()
            sandbox.connect(timeout=120)
            sandbox.files.write(f"/tmp/workloads-said/ask-{cycle}", "")
            rounds.append(collect(sandbox, cycle, names))
        return {name: [each[name] for each in rounds] for name in names}
    finally:
        sandbox.kill()


@pytest.fixture(scope="module")
def said(server, request):
    """A function that runs a program together with its group, once, and returns what that program said."""
    selected = {item.callspec.params.get("program") for item in request.session.items if hasattr(item, "callspec")}
    known = {}

    def ask(program):
        if program not in known:
            names = list(workloads.KEPT)
            first = names.index(program) // GROUP * GROUP
            known.update(cycles([name for name in names[first : first + GROUP] if name in selected]))
        return known[program]

    return ask


@pytest.mark.parametrize("program", workloads.KEPT)
def test_across_two_pauses(said, program):
    assert said(program) == ["ok"] * (1 + CYCLES)


def until(condition, what, seconds=10):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


def test_a_shell_on_a_terminal_keeps_variables_folder_jobs_and_terminal_settings(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=31, cols=99), timeout=0)

    def shell(line):
        sandbox.pty.send_stdin(terminal.pid, f"rm -f /tmp/said; {{ {line}; }} >/tmp/saying 2>&1; mv /tmp/saying /tmp/said\n".encode())
        until(lambda: sandbox.files.exists("/tmp/said"), f"the shell to run {line}")
        said = sandbox.files.read("/tmp/said")
        sandbox.files.remove("/tmp/said")
        return said

    shell("stty -echo -ixon intr ^B; KEPT='two words'; cd /usr/share")
    shell("sleep 1001 & sleep 1002 & kill -STOP %2; until jobs %2 | grep -q Stopped; do :; done")
    question = "echo $KEPT $PWD $(tty) $$; jobs -l; stty -a"
    before = shell(question)
    assert "two words /usr/share" in before and "Stopped" in before and "rows 31; columns 99" in before, before
    for _ in range(CYCLES):
        sandbox.pause()
        sandbox.connect()
        assert shell(question) == before
    assert shell("bg %2; until jobs %2 | grep -q Running; do :; done; kill %1 %2; wait; echo over").endswith("over\n")


def test_a_command_in_the_background_keeps_its_pipes_to_whoever_follows_it(sandbox):
    command = "while read -r line; do echo \"out $line\"; echo \"err $line\" >&2; done; exit 3"
    handle = sandbox.commands.run(command, background=True, stdin=True, timeout=0)
    for _ in range(CYCLES):
        sandbox.pause()
        sandbox.connect()
    followed = sandbox.commands.connect(handle.pid, timeout=30)
    sandbox.commands.send_stdin(handle.pid, "asked\n")
    seen = {}
    for out, err, _ in followed:
        seen.update({"out": out} if out else {}, **({"err": err} if err else {}))
        if len(seen) == 2:
            break
    assert seen == {"out": "out asked\n", "err": "err asked\n"}
    assert handle.pid in [process.pid for process in sandbox.commands.list()]


@pytest.fixture(scope="module")
def shared(server):
    """A sandbox for the causes, one after the other; each test leaves it running and free of its own."""
    sandbox = make(timeout=300)
    yield sandbox
    sandbox.kill()


REASONS = {
    "a_fuse_server": "serves a FUSE file system",
    "a_traced_process": "is being traced",
    "an_overlay_mounted_inside": "has a file system of type overlay mounted on /home/user/places/overlay/merged",
    "a_deleted_file_of_more_than_256_mib": "which holds 257 MiB; at most 256 MiB can be saved",
    "a_fanotify_watch": "watches files with fanotify",
    "a_file_open_on_a_file_system_that_is_no_longer_mounted": "on a file system that is mounted nowhere",
}


@pytest.mark.parametrize("cause", workloads.REFUSED)
def test_a_pause_is_refused_and_says_why_because_of(server, shared, cause):
    start(shared, [cause])
    pid = collect(shared, 0, [cause])[cause]
    assert pid.isdigit(), f"the cause could not be made: {pid}"
    try:
        status, body = api(server, "POST", f"/sandboxes/{shared.sandbox_id}/pause", {})
        assert status == 409 and f"(pid {pid}): " in body["message"] and REASONS[cause] in body["message"], body
        assert pid == "1" or f"python3 (pid {pid})" in body["message"], body
        assert shared.is_running() and shared.commands.run("echo on").stdout == "on\n"
    finally:
        shared.files.write(f"/tmp/workloads-said/ask-1-{cause}", "")
        ended = collect(shared, 1, [cause])[cause]
    assert ended == "ended"
    assert until(lambda: f"run {cause}" not in shared.commands.run("ps -eo args").stdout, "the cause to end")
    assert shared.pause()
    shared.connect(timeout=300)
    assert shared.commands.run("echo on").stdout == "on\n"


@pytest.mark.parametrize("root", [False, True], ids=["a_user", "root"])
def test_what_no_dump_could_take_along_cannot_be_made_by(shared, root):
    tried = json.loads(guest(shared, "attempts", root=root))
    assert tried.pop("clone3") == "ENOSYS"
    sockets = {name: tried.pop(name) for name in list(tried) if name.startswith("socket ")}
    assert sockets == dict.fromkeys(sockets, "EAFNOSUPPORT") and len(sockets) == 6
    assert tried == dict.fromkeys(tried, "EPERM") and len(tried) == 2 + 7 + 6
    assert shared.pause()
    shared.connect(timeout=300)
