import threading
import time

import pytest
from e2b import AuthenticationException, CommandExitException, InvalidArgumentException, NotFoundException, TimeoutException
from e2b.exceptions import SandboxException


def test_output_exit_code_and_error_are_told_apart(sandbox):
    with pytest.raises(CommandExitException) as failure:
        sandbox.commands.run("echo out; echo err >&2; exit 3")
    assert (failure.value.stdout, failure.value.stderr, failure.value.exit_code) == ("out\n", "err\n", 3)


def test_programs_find_their_locale_in_one_file(sandbox):
    # The thirteen single files would be a third of what a small program takes to start.
    archived = sandbox.commands.run("echo $LANG; locale charmap; localedef --list-archive").stdout
    assert archived.split() == ["C.UTF-8", "UTF-8", "C.utf8"]


def test_output_arrives_while_the_command_runs(sandbox):
    seen = []
    sandbox.commands.run("for i in 1 2 3; do echo $i; sleep 0.2; done", on_stdout=lambda text: seen.append((time.monotonic(), text)))
    assert "".join(text for _, text in seen) == "1\n2\n3\n"
    assert seen[-1][0] - seen[0][0] > 0.3


def test_a_background_command_can_be_listed_found_again_and_killed(sandbox):
    handle = sandbox.commands.run("echo ready; sleep 300", background=True)
    listed = {process.pid: process for process in sandbox.commands.list()}
    assert handle.pid in listed and "sleep 300" in listed[handle.pid].args[-1]
    assert sandbox.commands.run(f"kill -0 {handle.pid}").exit_code == 0
    assert sandbox.commands.kill(handle.pid)
    with pytest.raises(CommandExitException):
        sandbox.commands.run(f"kill -0 {handle.pid}")
    assert not sandbox.commands.kill(handle.pid)


def test_reconnecting_gives_the_output_from_then_on(sandbox):
    handle = sandbox.commands.run("for i in $(seq 20); do echo $i; sleep 0.1; done", background=True)
    handle.disconnect()
    seen = []
    result = sandbox.commands.connect(handle.pid).wait(on_stdout=seen.append)
    assert result.exit_code == 0 and seen[-1].endswith("20\n")


def test_stdin_reaches_the_command(sandbox):
    handle = sandbox.commands.run("read line; echo got $line", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "a line\n")
    assert handle.wait().stdout == "got a line\n"


def test_a_command_without_stdin_sees_its_end(sandbox):
    assert sandbox.commands.run("cat; echo end").stdout == "end\n"


def test_a_command_that_takes_too_long_is_ended(sandbox):
    started = time.monotonic()
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 61234", timeout=1)
    assert time.monotonic() - started < 5
    assert "61234" not in sandbox.commands.run("ps -ef | grep -v grep | grep 6123 || true").stdout


def test_users_environment_and_folder_are_as_asked(sandbox):
    assert sandbox.commands.run("id -un; echo $HOME", user="root").stdout == "root\n/root\n"
    assert sandbox.commands.run("echo $A $B", envs={"A": "1", "B": "two words"}).stdout == "1 two words\n"
    assert sandbox.commands.run("pwd", cwd="/usr/share").stdout == "/usr/share\n"
    assert sandbox.commands.run("id -G").stdout.split() == sandbox.commands.run("id -G user").stdout.split()


def test_an_unknown_user_and_a_missing_folder_are_named(sandbox):
    with pytest.raises(AuthenticationException, match="nobody-of-that-name"):
        sandbox.commands.run("true", user="nobody-of-that-name")
    with pytest.raises(InvalidArgumentException, match="/no/such/folder"):
        sandbox.commands.run("true", cwd="/no/such/folder")


def test_sudo_works_without_a_password_and_root_is_not_the_hosts(sandbox):
    assert sandbox.commands.run("sudo id -u").stdout == "0\n"
    assert sandbox.commands.run("sudo cat /proc/self/uid_map").stdout.split()[:2] != ["0", "0"]


@pytest.mark.parametrize(
    "what",
    [
        "sudo mknod /tmp/sda b 8 0",
        "sudo unshare --net true",
        "unshare --user true",
        "sudo sysctl -w kernel.hostname=x",
        "sudo mount -t proc proc /mnt && cat /mnt/sysrq-trigger && echo b | sudo tee /mnt/sysrq-trigger",
        "sudo dmesg",
        "sudo swapon /tmp/x",
        "sudo modprobe loop",
        "sudo chroot /proc/1/root/../../.. /bin/true/x",
    ],
)
def test_what_would_reach_the_host_is_refused(sandbox, what):
    with pytest.raises(CommandExitException):
        sandbox.commands.run(what)


def test_a_thousand_short_commands_leave_no_zombies(sandbox):
    sandbox.commands.run("for i in $(seq 1000); do (true &) ; done; wait", timeout=60)
    deadline = time.monotonic() + 5
    while "defunct" in (listing := sandbox.commands.run("ps -ef").stdout) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "defunct" not in listing


def test_a_megabyte_of_output_arrives_whole(sandbox):
    result = sandbox.commands.run("python3 -c \"print('x' * 1048576)\"")
    assert len(result.stdout) == 1048577


def test_multibyte_output_is_not_torn(sandbox):
    text = "aé漢😀" * 20000
    sandbox.files.write("text", text)
    assert sandbox.commands.run("cat text").stdout == text


def test_a_kill_in_the_middle_of_a_command_ends_it_for_its_caller(server):
    from e2b import Sandbox

    sandbox = Sandbox.create()
    killer = threading.Timer(0.5, sandbox.kill)
    killer.start()
    started = time.monotonic()
    with pytest.raises(SandboxException):
        sandbox.commands.run("sleep 60")
    assert time.monotonic() - started < 10
    killer.join()
    assert not sandbox.is_running()


def test_a_kill_of_an_unknown_pid_is_false(sandbox):
    assert sandbox.commands.kill(999_999) is False
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(999_999)


def test_a_pty_has_the_size_it_was_given(sandbox):
    from e2b import PtySize

    seen = []
    handle = sandbox.pty.create(PtySize(rows=33, cols=111))
    sandbox.pty.send_stdin(handle.pid, b"stty size; tty; exit\n")
    handle.wait(on_pty=lambda data: seen.append(data))
    text = b"".join(seen).decode()
    assert "33 111" in text and "/dev/pts/" in text


def test_a_pty_can_be_resized_and_killed(sandbox):
    from e2b import PtySize

    handle = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.resize(handle.pid, PtySize(rows=50, cols=132))
    sandbox.pty.send_stdin(handle.pid, b"stty size > /tmp/size\n")
    deadline = time.monotonic() + 5
    while not (sandbox.files.exists("/tmp/size") and sandbox.files.read("/tmp/size")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sandbox.files.read("/tmp/size") == "50 132\n"
    assert sandbox.pty.kill(handle.pid)
