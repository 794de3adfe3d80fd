"""A busy sandbox that is paused and resumed over and over: nothing of it is lost, and nothing of ours grows.

`test_soak.py` does some cycles in `make test`; `make soak` (tests/perf/soak.py) does 200.
"""

import io
import pathlib
import re
import subprocess
import tarfile
import tempfile
import time

from e2b import PtySize
from test_lifetime import host_pid_of_init
from test_workloads import collect, make, start

PROGRAMS = [
    "nine_threads_go_on_counting_under_one_lock",
    "loopback_tcp_keeps_its_connections_and_what_nobody_has_read",
    "a_fifo_and_a_pipe_keep_what_was_written",
    "shared_mappings_of_files_and_of_memory_are_still_shared",
    "locks_on_files_are_still_held",
    "inotify_goes_on_watching_files_and_folders",
    "a_periodic_timerfd_goes_on_after_a_tick_that_nobody_had_read",
    "sqlite_keeps_open_transactions_in_both_journal_modes",
    "node_keeps_its_http_server_worker_thread_and_child",
]
REDIS = "redis_keeps_its_keys_its_connections_and_its_subscribers"
REDIS_PACKAGES = ["redis-server", "redis-tools", "libjemalloc2", "liblua5.1-0", "liblzf1"]
# Parts of every system, of its own version each.
SYSTEM_LIBRARIES = re.compile(r"/(ld-linux|libc|libm|libpthread|libdl|librt)[-.]")


def redis_of_this_machines_debian():
    """An archive with redis and its libraries, from the packages that this machine's apt has; or why there is none."""
    with tempfile.TemporaryDirectory(prefix="stillbox-redis-") as folder:
        got = subprocess.run(["apt-get", "download", "-qq", *REDIS_PACKAGES], cwd=folder, capture_output=True, text=True)
        if got.returncode != 0:
            return None, f"apt-get download: {got.stderr.strip()[-300:]}"
        root = pathlib.Path(folder, "root")
        for package in pathlib.Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        # It is a link to one program of several names.
        program = next(path for path in (root / "usr/bin/redis-check-rdb", root / "usr/bin/redis-server") if path.is_file())
        libraries = {"LD_LIBRARY_PATH": str(root / "usr/lib/x86_64-linux-gnu")}
        needed = subprocess.run(["ldd", program], env=libraries, capture_output=True, text=True, check=True).stdout
        if "not found" in needed:
            return None, needed
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz", dereference=True) as tar:
            tar.add(program.resolve(), "redis-server")
            for name, path in re.findall(r"(\S+) => (/\S+)", needed):
                if not SYSTEM_LIBRARIES.search(path):
                    tar.add(pathlib.Path(path).resolve(), name)
        return archive.getvalue(), None


class Held:
    """What server and machine hold for one sandbox."""

    def __init__(self, server, sandbox):
        init, own = host_pid_of_init(sandbox), server.process.pid
        tree = [init]
        for pid in tree:
            tree += [int(child) for each in pathlib.Path(f"/proc/{pid}/task").glob("*/children") for child in each.read_text().split()]
        self.server_fds = len(list(pathlib.Path(f"/proc/{own}/fd").iterdir()))
        self.server_kib = field(own, "status", "VmRSS")
        self.mounts = sum(str(server.data_dir) in line for line in open("/proc/self/mountinfo"))
        self.processes = len(tree)
        self.fds = sum(len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir())) for pid in tree)
        self.agent_fds = len(list(pathlib.Path(f"/proc/{init}/fd").iterdir()))
        self.agent_maps = len(pathlib.Path(f"/proc/{init}/maps").read_text().splitlines())
        self.kib = sum(field(pid, "smaps_rollup", "Pss") for pid in tree)

    def __str__(self):
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


def field(pid, file, name):
    try:
        lines = pathlib.Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0  # It ended while we looked.
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


class Busy:
    """The sandbox and what runs in it."""

    def __init__(self):
        self.sandbox = make(timeout=3600)
        self.programs = list(PROGRAMS)
        archive, self.without_redis = redis_of_this_machines_debian()
        if archive:
            self.sandbox.files.write("/tmp/redis.tar.gz", archive)
            self.sandbox.commands.run("mkdir /tmp/redis && tar -xzf /tmp/redis.tar.gz -C /tmp/redis")
            self.programs.append(REDIS)
        start(self.sandbox, self.programs)
        self.terminal = self.sandbox.pty.create(PtySize(rows=24, cols=80), timeout=0)
        self.expect(0)
        self.shell("kept=0; cd /usr/share")
        self.took = {"pause": [], "resume": []}

    def expect(self, cycle):
        said = collect(self.sandbox, cycle, self.programs)
        assert said == dict.fromkeys(self.programs, "ok"), f"cycle {cycle}: { {name: what for name, what in said.items() if what != 'ok'} }"

    def shell(self, line):
        """What the shell on the terminal says to a line."""
        self.sandbox.pty.send_stdin(self.terminal.pid, f"{{ {line}; }} >/tmp/saying 2>&1; mv /tmp/saying /tmp/said\n".encode())
        found = "for i in $(seq 200); do [ -e /tmp/said ] && break; sleep 0.02; done; cat /tmp/said && rm /tmp/said"
        return self.sandbox.commands.run(found).stdout

    def cycle(self, number):
        for verb, act in (("pause", self.sandbox.pause), ("resume", lambda: self.sandbox.connect(timeout=3600))):
            began = time.monotonic()
            act()
            self.took[verb].append(time.monotonic() - began)
        self.sandbox.files.write(f"/tmp/workloads-said/ask-{number}", "")
        self.expect(number)
        said = self.shell("kept=$((kept+1)); echo $kept $PWD")
        assert said == f"{number} /usr/share\n", f"the shell on the terminal said {said!r} in cycle {number}"


def assert_no_growth(early, late, cycles):
    """What is counted is the same; what is measured in KiB may breathe."""
    for name in ("mounts", "processes", "agent_fds"):
        assert getattr(late, name) == getattr(early, name), f"{name}: {getattr(early, name)} and then {getattr(late, name)}"
    # Connections of the proxy's pool come and go.
    assert late.server_fds <= early.server_fds + 4, f"the server's files: {early.server_fds} and then {late.server_fds}"
    assert late.fds <= early.fds + 8, f"open files inside: {early.fds} and then {late.fds}"
    assert late.agent_maps <= early.agent_maps + 4, f"mappings of the agent: {early.agent_maps} and then {late.agent_maps}"
    assert late.server_kib <= early.server_kib + 8192, f"the server's memory: {early.server_kib} KiB and then {late.server_kib}"
    # What the programs keep on purpose grows by some KiB a cycle: their answers, rows and keys.
    assert late.kib <= early.kib * 1.1 + 64 * cycles, f"memory inside: {early.kib} KiB and then {late.kib}"
