import time

import pytest
from e2b import NotFoundException, Sandbox
from e2b.exceptions import SandboxException


def gone_after(sandbox, seconds_max):
    started = time.monotonic()
    while sandbox.is_running() and time.monotonic() - started < seconds_max:
        time.sleep(0.05)
    return time.monotonic() - started


def test_a_sandbox_ends_when_its_time_is_up(server):
    sandbox = Sandbox.create(timeout=3)
    assert 2 < gone_after(sandbox, 6) < 4.5
    with pytest.raises(NotFoundException):
        sandbox.get_info()


def test_its_end_can_be_moved_nearer_and_further(sandbox):
    sandbox.set_timeout(600)
    info = sandbox.get_info()
    assert 590 < info.end_at.timestamp() - time.time() <= 601
    sandbox.set_timeout(1)
    assert gone_after(sandbox, 5) < 3


def test_connecting_finds_it_again_and_never_shortens_its_time(sandbox):
    sandbox.files.write("mark", "here")
    end = sandbox.get_info().end_at
    again = Sandbox.connect(sandbox.sandbox_id, timeout=1)
    assert again.files.read("mark") == "here"
    assert again.get_info().end_at >= end


def test_a_killed_one_cannot_be_reached_by_any_call(server):
    sandbox = Sandbox.create()
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    assert not sandbox.is_running()
    for call in (sandbox.get_info, lambda: Sandbox.connect(sandbox.sandbox_id), lambda: sandbox.set_timeout(10)):
        with pytest.raises(NotFoundException):
            call()
    with pytest.raises(SandboxException):
        sandbox.commands.run("true")


def test_a_sandbox_whose_first_process_dies_is_gone_with_the_reason_in_the_log(server):
    sandbox = Sandbox.create()
    init = None
    for line in server.cli("sandbox", "info", sandbox.sandbox_id, "--json").stdout.splitlines():
        if '"initPid"' in line:
            init = int(line.split(":")[1].strip(" ,"))
    if init is None:
        init = host_pid_of_init(sandbox)
    import os
    import signal

    os.kill(init, signal.SIGKILL)
    assert gone_after(sandbox, 5) < 5
    deadline = time.monotonic() + 5
    told = []
    while not told and time.monotonic() < deadline:
        told = [line for line in server.log().splitlines() if sandbox.sandbox_id in line and "signal" in line]
        time.sleep(0.05)
    assert told, server.log()[-2000:]


def host_pid_of_init(sandbox):
    """The host's pid of the process that is pid 1 in the sandbox, found by the sandbox's own boot id."""
    import pathlib

    marker = sandbox.commands.run("cat /etc/machine-id").stdout.strip()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            numbers = [line.split()[1:] for line in (folder / "status").read_text().splitlines() if line.startswith("NSpid:")]
            if numbers and len(numbers[0]) > 1 and numbers[0][-1] == "1" and (folder / "root/etc/machine-id").read_text().strip() == marker:
                return int(folder.name)
        except OSError:
            continue  # ended while we looked
    raise RuntimeError("no such process")
