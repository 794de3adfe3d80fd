"""Pause, resume, fork, snapshots: memory, processes and files stop, last, go on and multiply."""

import concurrent.futures
import os
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from e2b import NotFoundException, Sandbox
from e2b.exceptions import SandboxException
from test_create import api

# A counter that lives in memory only: its source is deleted while it runs, so that a restart could not bring it back.
COUNTER = r"""
import http.server, os, threading, time
os.unlink(__file__)
started = time.time_ns()
count = 0
def tick():
    global count
    while True:
        count += 1
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f'{os.getpid()} {count} {started}'.encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(('127.0.0.1', 7000), Handler).serve_forever()
"""


def start_counter(sandbox):
    sandbox.files.write("/tmp/counter.py", COUNTER)
    handle = sandbox.commands.run("exec python3 /tmp/counter.py", background=True, timeout=0)
    deadline = time.monotonic() + 10
    while ":7000" not in sandbox.commands.run("ss -ltn").stdout and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sandbox.files.exists("/tmp/counter.py")
    return handle


def counter(sandbox):
    """(pid, count, when the program began, as it remembers it)"""
    pid, count, started = sandbox.commands.run("curl -s http://127.0.0.1:7000/").stdout.split()
    return pid, int(count), started


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.1)


def through_proxy(server, sandbox, port, path="/"):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}")
    request.add_header("Host", f"{port}-{sandbox.sandbox_id}.stillbox.localhost")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_memory_and_not_a_restart_comes_back(sandbox):
    start_counter(sandbox)
    pid, count, started = counter(sandbox)
    boot = sandbox.files.read("/proc/sys/kernel/random/boot_id")
    assert sandbox.pause()
    time.sleep(1)
    sandbox.connect()
    again = counter(sandbox)
    assert (again[0], again[2]) == (pid, started)
    assert count <= again[1] < count + 90, "the counter went on while the sandbox was paused"
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") == boot


def test_a_paused_one_is_not_running_and_pausing_it_again_says_so(server, sandbox):
    assert sandbox.is_running()
    sandbox.pause()
    assert not sandbox.is_running()
    assert sandbox.get_info().state.value == "paused"
    status, body = api(server, "POST", f"/sandboxes/{sandbox.sandbox_id}/pause", {})
    assert status == 409 and body["code"] == 409
    with pytest.raises(SandboxException):
        sandbox.commands.run("true")
    sandbox.connect()
    assert sandbox.is_running() and sandbox.commands.run("echo on").stdout == "on\n"


def test_a_command_goes_on_where_it_was_and_can_be_followed_again(sandbox):
    handle = sandbox.commands.run("for i in $(seq 1 40); do echo $i; sleep 0.1; done", background=True, timeout=0)
    time.sleep(0.5)
    sandbox.pause()
    sandbox.connect()
    seen = []
    result = sandbox.commands.connect(handle.pid, timeout=0).wait(on_stdout=seen.append)
    assert result.exit_code == 0 and "".join(seen).split()[-1] == "40"


def test_a_shell_on_a_terminal_keeps_its_variables(sandbox):
    from e2b import PtySize

    handle = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=0)
    sandbox.pty.send_stdin(handle.pid, b"KEPT=it-is-kept; cd /usr/share\n")
    time.sleep(0.3)
    sandbox.pause()
    sandbox.connect()
    sandbox.pty.send_stdin(handle.pid, b"echo $KEPT $PWD > /tmp/kept\n")
    deadline = time.monotonic() + 5
    while not (sandbox.files.exists("/tmp/kept") and sandbox.files.read("/tmp/kept")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sandbox.files.read("/tmp/kept") == "it-is-kept /usr/share\n"


def test_files_only_keeps_files_and_boots_anew(sandbox):
    sandbox.files.write("kept", "yes")
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    boot = sandbox.files.read("/proc/sys/kernel/random/boot_id")
    assert sandbox.pause(keep_memory=False)
    sandbox.connect()
    assert sandbox.files.read("kept") == "yes"
    assert sandbox.files.read("/proc/sys/kernel/random/boot_id") != boot
    assert "sleep 1000" not in sandbox.commands.run("ps -ef").stdout
    assert handle.pid not in [process.pid for process in sandbox.commands.list()]


def test_many_connects_share_one_resume(sandbox):
    start_counter(sandbox)
    pid, _, started = counter(sandbox)
    sandbox.pause()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        connected = list(pool.map(lambda _: Sandbox.connect(sandbox.sandbox_id), range(8)))
    assert {each.sandbox_id for each in connected} == {sandbox.sandbox_id}
    assert (counter(sandbox)[0], counter(sandbox)[2]) == (pid, started)


def test_time_running_out_pauses_when_asked_to(server):
    sandbox = Sandbox.create(timeout=2, lifecycle={"on_timeout": "pause"})
    try:
        start_counter(sandbox)
        pid, _, started = counter(sandbox)
        deadline = time.monotonic() + 6
        while sandbox.get_info().state.value != "paused" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sandbox.get_info().state.value == "paused"
        sandbox.connect(timeout=60)
        assert (counter(sandbox)[0], counter(sandbox)[2]) == (pid, started)
    finally:
        sandbox.kill()


def test_traffic_wakes_a_sandbox_that_may_be_woken(server):
    sandbox = Sandbox.create(timeout=60, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        start_counter(sandbox)
        sandbox.pause()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: through_proxy(server, sandbox, 7000), range(4)))
        assert len({answer.split()[0] for answer in answers}) == 1
        sandbox.pause()
        assert sandbox.commands.run("echo awake").stdout == "awake\n"
    finally:
        sandbox.kill()


def test_traffic_does_not_wake_one_that_may_not(server, sandbox):
    sandbox.pause()
    with pytest.raises(urllib.error.HTTPError) as refused:
        through_proxy(server, sandbox, 7000)
    assert refused.value.code == 502 and b"was not found" in refused.value.read()
    assert sandbox.get_info().state.value == "paused"


def test_forks_go_on_from_one_moment_and_diverge(sandbox):
    start_counter(sandbox)
    sandbox.files.write("shared", "before")
    pid, count, started = counter(sandbox)
    forks = sandbox.fork(count=3, timeout=120)
    try:
        assert all(isinstance(fork, Sandbox) for fork in forks), forks
        assert len({fork.sandbox_id for fork in forks} | {sandbox.sandbox_id}) == 4
        for number, fork in enumerate(forks):
            again = counter(fork)
            assert (again[0], again[2]) == (pid, started) and again[1] >= count
            assert fork.files.read("shared") == "before"
            fork.files.write("shared", f"fork {number}")
        assert sandbox.files.read("shared") == "before"
        assert [fork.files.read("shared") for fork in forks] == ["fork 0", "fork 1", "fork 2"]
        names = {each.commands.run("hostname; cat /etc/machine-id").stdout for each in [sandbox, *forks]}
        assert len(names) == 4
        assert counter(sandbox)[0] == pid
    finally:
        for fork in forks:
            if isinstance(fork, Sandbox):
                fork.kill()


def test_forks_can_tell_that_they_are_copies_and_do_not_share_randomness(sandbox):
    sandbox.commands.run("test -r /run/stillbox/generation")
    before = sandbox.files.read("/run/stillbox/generation")
    forks = sandbox.fork(count=2, timeout=60)
    try:
        generations = [fork.files.read("/run/stillbox/generation") for fork in forks]
        assert before not in generations
        random = [each.commands.run("head -c 16 /dev/urandom | xxd -p || head -c 16 /dev/urandom | od -An -tx1").stdout for each in forks]
        assert random[0] != random[1]
    finally:
        for fork in forks:
            fork.kill()


SQLITE = r"""
import sqlite3, sys, time, os
connections = []
for mode in ('wal', 'delete'):
    connection = sqlite3.connect(f'/home/user/{mode}.db', isolation_level=None)
    connection.execute(f'pragma journal_mode={mode}')
    connection.execute('create table if not exists numbers (n integer)')
    connections.append(connection)
open('/tmp/ready', 'w').close()
n = 0
while True:
    for connection in connections:
        connection.execute('insert into numbers values (?)', (n,))
        rows = connection.execute('select count(*) from numbers').fetchone()[0]
        assert rows == n + 1, (rows, n)
    n += 1
    with open('/tmp/count', 'w') as file: file.write(str(n))
    time.sleep(0.02)
"""


def test_an_open_sqlite_connection_goes_on_in_source_and_forks(sandbox):
    sandbox.files.write("/tmp/writer.py", SQLITE)
    handle = sandbox.commands.run("exec python3 /tmp/writer.py 2>/tmp/error", background=True, timeout=0)
    deadline = time.monotonic() + 10
    while not sandbox.files.exists("/tmp/count") and time.monotonic() < deadline:
        time.sleep(0.05)
    forks = sandbox.fork(count=2, timeout=120)
    sandbox.pause()
    sandbox.connect()
    try:
        for each in [sandbox, *forks]:
            before = int(each.files.read("/tmp/count") or 0)
            time.sleep(0.5)
            assert int(each.files.read("/tmp/count")) > before, each.files.read("/tmp/error")
            assert each.files.read("/tmp/error") == ""
            assert handle.pid in [process.pid for process in each.commands.list()]
    finally:
        for fork in forks:
            fork.kill()


def test_a_snapshot_of_files_alone_starts_cold(server):
    source = Sandbox.create(timeout=120, envs={"ONLY": "the source's"})
    start_counter(source)
    pid, _, _ = counter(source)
    boot_id = source.files.read("/proc/sys/kernel/random/boot_id")
    source.files.write("/home/user/kept", "before")
    snapshot = source.create_snapshot(name="files-alone", mode="filesystem")
    assert source.is_running() and counter(source)[0] == pid
    assert snapshot.snapshot_id in [each.snapshot_id for each in source.list_snapshots().next_items()]
    source.files.write("/home/user/kept", "after")
    copies = [Sandbox.create(snapshot.snapshot_id, timeout=120) for _ in range(2)]
    try:
        for copy in copies:
            assert copy.files.read("/home/user/kept") == "before"
            copy.files.write("/home/user/kept", copy.sandbox_id)
            assert copy.files.read("/proc/sys/kernel/random/boot_id") != boot_id
            assert copy.commands.run("pgrep -f '[c]ounter.py' || echo none; echo \"[$ONLY]\"").stdout == "none\n[]\n"
        assert [copy.files.read("/home/user/kept") for copy in copies] == [copy.sandbox_id for copy in copies]
        # They are sandboxes like any other: a snapshot of one with its memory too.
        copies[0].pause()
        copies[0].connect()
        assert copies[0].files.read("/home/user/kept") == copies[0].sandbox_id
    finally:
        for copy in [source, *copies]:
            copy.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False


# Both ends of a connection; the reader waits for a word, so that the queues of both are full at the pause.
LAGGING = r"""
import hashlib, os, socket, threading, time
def piece(number): return hashlib.sha256(str(number).encode()).digest() * 400
listener = socket.create_server(('127.0.0.1', 0))
near = socket.create_connection(listener.getsockname()); far, _ = listener.accept()
def send():
    for number in range(1500): near.sendall(piece(number))
    near.close()
threading.Thread(target=send).start()
time.sleep(1); open('/tmp/full', 'w').close()
while not os.path.exists('/tmp/read'): time.sleep(0.05)
got = b''.join(iter(lambda: far.recv(1 << 16), b''))
with open('/tmp/result.new', 'w') as file: file.write(str(got == b''.join(map(piece, range(1500)))))
os.rename('/tmp/result.new', '/tmp/result')
"""


def test_a_connection_whose_reader_lags_goes_on_with_every_byte(sandbox):
    sandbox.files.write("/tmp/lagging.py", LAGGING)
    sandbox.commands.run("exec python3 /tmp/lagging.py 2>/tmp/lagging.log", background=True, timeout=0)
    wait_until(lambda: sandbox.files.exists("/tmp/full"))
    [copy] = sandbox.fork(timeout=120)
    sandbox.pause()
    sandbox.connect()
    try:
        for each in [sandbox, copy]:
            each.files.write("/tmp/read", "")
            wait_until(lambda: each.files.exists("/tmp/result") or each.files.read("/tmp/lagging.log"))
            assert each.files.read("/tmp/lagging.log") == "" and each.files.read("/tmp/result") == "True"
    finally:
        copy.kill()


def test_a_snapshot_outlives_its_source_and_makes_many(server):
    source = Sandbox.create(timeout=120)
    start_counter(source)
    pid, count, started = counter(source)
    snapshot = source.create_snapshot()
    assert source.is_running() and counter(source)[0] == pid
    assert snapshot.snapshot_id in [each.snapshot_id for each in source.list_snapshots().next_items()]
    source.kill()
    copies = [Sandbox.create(snapshot.snapshot_id, timeout=120) for _ in range(3)]
    try:
        for copy in copies:
            again = counter(copy)
            assert (again[0], again[2]) == (pid, started) and again[1] >= count
    finally:
        for copy in copies:
            copy.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False
    with pytest.raises(SandboxException):
        Sandbox.create(snapshot.snapshot_id)


TRACER = r"""
import ctypes, os, time
PTRACE_ATTACH = 16
pid = os.fork()
if pid == 0:
    time.sleep(1000)
if ctypes.CDLL(None).ptrace(PTRACE_ATTACH, pid, 0, 0) == 0:
    os.waitpid(pid, 0)
    open('/tmp/traced', 'w').close()
time.sleep(1000)
"""

OVERLAY = (
    "sudo sh -c 'mkdir -p /tmp/o/l /tmp/o/u /tmp/o/w /tmp/o/m && "
    "mount -t tmpfs tmpfs /tmp/o && mkdir -p /tmp/o/l /tmp/o/u /tmp/o/w /tmp/o/m && "
    "mount -t overlay overlay -o lowerdir=/tmp/o/l,upperdir=/tmp/o/u,workdir=/tmp/o/w /tmp/o/m'"
)


def test_what_cannot_be_paused_is_named_and_runs_on(server, sandbox):
    sandbox.files.write("/tmp/tracer.py", TRACER)
    handle = sandbox.commands.run("sudo python3 /tmp/tracer.py", background=True, timeout=0)
    deadline = time.monotonic() + 10
    while not sandbox.files.exists("/tmp/traced"):
        assert time.monotonic() < deadline, "the tracer never attached"
        time.sleep(0.1)
    status, body = api(server, "POST", f"/sandboxes/{sandbox.sandbox_id}/pause", {})
    assert status == 409 and "python3" in body["message"] and "trac" in body["message"], body
    explained = server.cli("sandbox", "explain", sandbox.sandbox_id, check=False)
    assert "python3" in explained.stdout, explained
    assert sandbox.commands.run("echo still running").stdout == "still running\n"
    sandbox.commands.run("sudo pkill -9 -f '[t]racer.py'; true")
    handle.disconnect()
    time.sleep(0.2)
    assert sandbox.pause()


def test_an_overlay_mounted_inside_is_refused_before_anything_is_touched(server, sandbox):
    sandbox.commands.run(OVERLAY)
    status, body = api(server, "POST", f"/sandboxes/{sandbox.sandbox_id}/pause", {})
    assert status == 409 and "/tmp/o/m" in body["message"], body
    sandbox.commands.run("sudo umount /tmp/o/m")
    assert sandbox.pause()


def test_ten_cycles_lose_nothing(sandbox):
    start_counter(sandbox)
    pid, last, started = counter(sandbox)
    blob = os.urandom(200_000)
    sandbox.files.write("blob", blob)
    for _ in range(10):
        sandbox.pause()
        sandbox.connect()
        again = counter(sandbox)
        assert (again[0], again[2]) == (pid, started) and again[1] >= last
        last = again[1]
    assert bytes(sandbox.files.read("blob", format="bytes")) == blob


MUCH_MEMORY = r"""
import hashlib, os, http.server
memory = bytearray(os.urandom(1 << 20)) * 600
digest = hashlib.sha256(memory).hexdigest()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(self.path != '/all' or hashlib.sha256(memory).hexdigest() == digest).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(('127.0.0.1', 7000), Handler).serve_forever()
"""


def test_much_memory_comes_back_lazily_and_whole_and_can_be_paused_again(server, sandbox):
    sandbox.files.write("/tmp/much.py", MUCH_MEMORY)
    sandbox.commands.run("exec python3 /tmp/much.py", background=True, timeout=0)
    deadline = time.monotonic() + 30
    while ":7000" not in sandbox.commands.run("ss -ltn").stdout and time.monotonic() < deadline:
        time.sleep(0.1)
    for _ in range(2):
        sandbox.pause()
        sandbox.connect()
        assert through_proxy(server, sandbox, 7000) == b"True"
        assert through_proxy(server, sandbox, 7000, "/all") == b"True"


def test_a_paused_one_can_be_killed_and_is_gone(server):
    sandbox = Sandbox.create(timeout=60)
    sandbox.pause()
    assert sandbox.kill()
    with pytest.raises(NotFoundException):
        Sandbox.connect(sandbox.sandbox_id)


def test_a_paused_one_holds_no_memory_no_mount_and_no_cgroup(server, sandbox):
    sandbox.pause()
    mounts = open("/proc/self/mountinfo").read()
    assert sandbox.sandbox_id not in mounts
    found = subprocess.run(["find", "/sys/fs/cgroup", "-name", f"*{sandbox.sandbox_id}*"], capture_output=True, text=True).stdout
    assert found == ""
