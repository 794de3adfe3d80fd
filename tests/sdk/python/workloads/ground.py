"""What the programs share: conditions with deadlines, children, C calls."""

import ctypes
import json
import os
import pathlib
import signal
import socket
import time
import traceback

FOLDER = pathlib.Path("/tmp/workloads-said")
WAIT_S_MAX = 10
POLL_S = 0.02

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p

AS_ROOT = set()


def as_root(function):
    AS_ROOT.add(function.__name__)
    return function


def until(condition, what):
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S_MAX} s for: {what}"
        time.sleep(POLL_S)


def same(found, expected, what):
    assert found == expected, f"{what}: {str(found)[:200]} and not {str(expected)[:200]}"


def call(result, name):
    """What a C function answered, or its errno as an exception."""
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def place(name):
    """A folder of the program's own, outside the one that the test looks into."""
    folder = pathlib.Path("/home/user/places") / name
    folder.mkdir(parents=True)
    return folder


def child(work):
    """Forks a process that does `work` and never comes back here; it ends with its parent."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        try:
            if os.getppid() == parent:
                work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def state_of(pid):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


class Asked:
    """A child that answers a question, each time that it is asked, with what `answer` returns."""

    def __init__(self, prepare, answer):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def work():
            ours.close()
            prepare()
            theirs.send(b'"prepared"')
            while theirs.recv(100):
                try:
                    said = answer()
                except Exception as error:
                    said = repr(error)
                theirs.send(json.dumps(said).encode())

        self.pid = child(work)
        theirs.close()
        self.socket = ours
        self.socket.settimeout(WAIT_S_MAX)
        same(json.loads(self.socket.recv(10_000) or b'"it ended"'), "prepared", "the child")

    def ask(self):
        self.socket.send(b"?")
        return json.loads(self.socket.recv(100_000) or b'"it ended"')
