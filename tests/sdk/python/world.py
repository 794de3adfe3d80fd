"""A world of a test's own: mounts, names and network that nobody else on this machine sees, and an internet behind them.

Needs root. The calling thread, and the processes that it starts, live in it until the `with` ends; nothing global changes.
"""

import contextlib
import ctypes
import os
import pathlib
import socket
import socketserver
import subprocess
import sys
import threading

INTERNET = pathlib.Path(__file__).parent / "internet.py"
# Which of the internet's addresses are what; internet.py gives them to itself.
RESOLVER = "8.8.8.8"
HOST = "198.51.100.2"
# Free for a test's server: its own name server listens on loopback.
NAME_SERVER = "127.0.53.53"

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWNET = 0x0002_0000, 0x4000_0000
_MS_BIND, _MS_REC, _MS_SLAVE = 1 << 12, 1 << 14, 1 << 19


def _checked(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _mount(source, target, flags):
    _checked(_libc.mount(str(source).encode(), str(target).encode(), None, flags, None), f"mount {target}")


def _run(*command):
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def own_world(folder, real_hosts=()):
    """Namespaces of the caller's own, with /etc/hosts and /etc/resolv.conf from `folder`, and an internet. Of the machine's
    own network, `real_hosts` alone are part of it."""
    relay = folder / "relay"
    if real_hosts:
        # Its threads stay where they are made: outside.
        threading.Thread(target=Relay(str(relay), RelayHandler).serve_forever, daemon=True).start()
    folder_before = os.getcwd()
    namespaces = [os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "mnt")]
    _checked(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "unshare (these tests need root)")
    try:
        # Others' unmounts come through, so that nothing of theirs is kept; ours stay here.
        _mount("none", "/", _MS_REC | _MS_SLAVE)
        for name, text in (("hosts", "127.0.0.1 localhost\n::1 localhost\n"), ("resolv.conf", f"nameserver {RESOLVER}\n")):
            (folder / name).write_text(text)
            _mount(folder / name, os.path.realpath(f"/etc/{name}"), _MS_BIND)
        _run("ip", "link", "set", "lo", "up")
        with _internet(relay, real_hosts) as internet:
            yield internet
    finally:
        for namespace in namespaces:
            _checked(_libc.setns(namespace, 0), "setns")
            os.close(namespace)
        os.chdir(folder_before)


class Relay(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class RelayHandler(socketserver.StreamRequestHandler):
    """`host port` in a line, and from then on what that host and port say."""

    rbufsize = 0

    def handle(self):
        host, port = self.rfile.readline().split()
        with socket.create_connection((host.decode(), int(port)), timeout=30) as outside:
            outside.settimeout(None)
            splice(self.connection, outside)


def splice(one, other):
    """Both ways, until both are done."""

    def copy(source, target):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=copy, args=(other, one), daemon=True)
    back.start()
    copy(one, other)
    back.join()


@contextlib.contextmanager
def _internet(relay, real_hosts):
    """A network behind a gateway, which knows names and serves HTTP (internet.py); its process."""
    process = subprocess.Popen(["unshare", "--net", sys.executable, INTERNET, relay, *real_hosts], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "started\n"
        _run("ip", "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", str(process.pid))
        _run("ip", "address", "add", f"{HOST}/24", "dev", "wan")
        _run("ip", "link", "set", "wan", "up")
        _run("ip", "route", "add", "default", "via", "198.51.100.1")
        process.stdin.write("linked\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
