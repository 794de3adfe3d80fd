"""What happens around the server: its death, its restart, two of them, and what is left when all is over."""

import os
import subprocess
import sys
import threading
import time

import pytest
from e2b import Sandbox
from server import ENVIRONMENT, Server, free_port


@pytest.fixture
def own_server():
    before = dict(os.environ)
    server = Server()
    server.start()
    os.environ.update(server.environment())
    yield server
    server.remove()
    os.environ.clear()
    os.environ.update(before)


def wait_until_nothing_is_left(server):
    """The template's dump, made in the background at first start, has a sandbox of its own for a while."""
    deadline = time.monotonic() + 20
    while server.leftovers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.leftovers() == []


def test_kill_9_of_the_server_leaves_commands_running_and_their_output_arriving(own_server):
    sandbox = Sandbox.create(timeout=600)
    handle = sandbox.commands.run("for i in $(seq 200); do echo line-$i; sleep 0.05; done; echo the-end", background=True, timeout=0)
    time.sleep(1)
    own_server.kill9()
    time.sleep(1)
    own_server.start()
    assert sandbox.is_running()
    assert handle.pid in [process.pid for process in sandbox.commands.list()]
    seen = []
    result = sandbox.commands.connect(handle.pid, timeout=0).wait(on_stdout=seen.append)
    assert result.exit_code == 0 and "the-end" in "".join(seen)


def test_what_sandboxes_live_within_is_of_the_server_that_makes_them_and_stays_with_those_that_it_paused(own_server):
    own_server.wait_for_dump("base")
    mount = "sudo mount -t tmpfs none /mnt && echo mounted"
    paused = Sandbox.create(timeout=600)
    assert paused.commands.run(mount).stdout == "mounted\n"
    paused.commands.run("echo kept > /mnt/file")
    paused.pause()
    own_server.stop()
    # As after an upgrade that changes the system call filter, capabilities or mounts.
    own_server.settings["sandbox.mounts"] = "none"
    own_server.start()
    fresh = Sandbox.create(timeout=60)
    with pytest.raises(Exception, match="permission denied"):
        fresh.commands.run(mount)
    paused.connect()
    assert paused.commands.run("cat /mnt/file; sudo umount /mnt && " + mount).stdout == "kept\nmounted\n"
    assert f"Sandbox {paused.sandbox_id} was paused under another kernel or stillbox" in own_server.log()


def test_timeouts_go_on_after_a_restart(own_server):
    sandbox = Sandbox.create(timeout=5)
    kept = Sandbox.create(timeout=600)
    own_server.kill9()
    own_server.start()
    deadline = time.monotonic() + 8
    while sandbox.is_running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not sandbox.is_running() and kept.is_running()
    assert kept.commands.run("echo still here").stdout == "still here\n"


def test_a_sandbox_that_died_while_the_server_was_down_is_gone_afterwards(own_server):
    from test_lifetime import host_pid_of_init

    sandbox = Sandbox.create(timeout=600)
    pid = host_pid_of_init(sandbox)
    own_server.kill9()
    os.kill(pid, 9)
    own_server.start()
    assert not sandbox.is_running()
    wait_until_nothing_is_left(own_server)


def test_a_second_server_on_the_same_folder_is_refused_with_one_line(own_server):
    other = Server()
    other.data_dir.rmdir()
    other.data_dir = own_server.data_dir
    result = other.cli("serve", check=False)
    assert result.returncode != 0
    lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    assert any(str(own_server.data_dir) in line for line in lines), lines


def test_a_busy_port_and_an_unknown_setting_say_what_to_do(own_server):
    other = Server()
    other.port = own_server.port
    result = other.cli("serve", check=False)
    assert result.returncode != 0 and str(own_server.port) in result.stderr, result.stderr
    result = other.cli("--set=colour=red", "serve", check=False)
    assert result.returncode != 0 and "colour" in result.stderr
    other.remove()


def test_output_that_nobody_reads_to_its_end_ends_without_a_trace(server):
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(server.command("doctor"), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=ENVIRONMENT)
    os.close(writing)
    assert "panicked" not in result.stderr, result.stderr


def test_no_other_test_process_is_given_a_port_of_ours():
    ours = free_port()
    ask = f"import server; server.PORTS = range({ours}, {ours + 1}); server.free_port()"
    asked = subprocess.run([sys.executable, "-c", ask], cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert f"every port of range({ours}, {ours + 1}) is in use" in asked.stderr


def test_two_servers_side_by_side_do_not_touch_each_other(own_server):
    first = Sandbox.create(timeout=600)
    before = dict(os.environ)
    second_server = Server().start()
    try:
        os.environ.update(second_server.environment())
        second = Sandbox.create(timeout=600)
        assert second.commands.run("echo two").stdout == "two\n"
        second.kill()
        wait_until_nothing_is_left(second_server)
    finally:
        second_server.remove()
        os.environ.clear()
        os.environ.update(before)
    assert first.commands.run("echo one").stdout == "one\n"


def test_twenty_creates_and_kills_leave_nothing_behind(own_server):
    for _ in range(4):
        threads = [threading.Thread(target=lambda: Sandbox.create(timeout=60).kill()) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wait_until_nothing_is_left(own_server)


def test_after_a_stop_nothing_of_an_idle_server_is_left(own_server):
    instance = own_server.instance()
    Sandbox.create(timeout=60).kill()
    own_server.stop()
    assert own_server.process.returncode == 0, own_server.log()[-1000:]
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
    mounts = open("/proc/self/mountinfo").read()
    assert instance not in links and instance not in tables, (links, tables)
    assert str(own_server.data_dir / "sandboxes") not in mounts


def test_the_command_line_does_what_the_sdk_does(own_server):
    # No domain is set, and a log in a file has no colours.
    assert own_server.environment()["E2B_DOMAIN"] == f"stillbox.localhost:{own_server.tls_port}"
    assert "Serving" in own_server.log() and "\x1b" not in own_server.log()
    identity = own_server.cli("sandbox", "create", "base", "--timeout", "120", "--env", "A=b").stdout.strip()
    result = own_server.cli("sandbox", "exec", identity, "--", "sh", "-c", "echo $A; echo err >&2; exit 7", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (7, "b\n", "err\n")
    result = own_server.cli("sandbox", "exec", "-i", identity, "--", "cat", input="through stdin")
    assert result.stdout == "through stdin"
    assert identity in own_server.cli("sandbox", "ls").stdout
    assert "running" in own_server.cli("sandbox", "info", identity).stdout
    assert "base" in own_server.cli("template", "ls").stdout
    own_server.cli("sandbox", "exec", identity, "--", "sh", "-c", "setsid sleep 4242 > /dev/null 2>&1 &")
    own_server.cli("sandbox", "pause", identity)
    result = own_server.cli("sandbox", "exec", identity, "--", "true", check=False)
    assert result.returncode != 0 and f"sandbox {identity} is paused; `stillbox sandbox resume {identity}`" in result.stderr
    assert own_server.cli("sandbox", "resume", "--files-only", identity).stdout.strip() == identity
    # Booted cold: only the shell that looks, and the agent.
    assert own_server.cli("sandbox", "exec", identity, "--", "sh", "-c", "pgrep -c sleep; true").stdout == "0\n"
    own_server.cli("sandbox", "pause", identity)
    kept = own_server.cli("df").stdout
    assert f"sandbox {identity} " in kept and "template base " in kept, kept
    own_server.cli("sandbox", "kill", identity)
    assert identity not in own_server.cli("sandbox", "ls").stdout
    result = own_server.cli("sandbox", "info", identity, check=False)
    assert result.returncode != 0 and identity in result.stderr
