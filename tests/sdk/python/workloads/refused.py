"""What cannot be saved: each sets up, yields the pid that the refusal has to name, and ends the cause."""

import ctypes
import errno
import os
import platform
import signal
import socket

from .ground import as_root, call, child, libc, place


def a_fuse_server():
    fuse = os.open("/dev/fuse", os.O_RDWR)
    yield os.getpid()
    os.close(fuse)


def a_traced_process():
    pid = child(signal.pause)
    call(libc.ptrace(0x4206, pid, None, None), "PTRACE_SEIZE")
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@as_root
def an_overlay_mounted_inside():
    folder = place("overlay")
    path = os.fsencode(folder)
    call(libc.mount(b"tmpfs", path, b"tmpfs", 0, b"size=1m"), "mount tmpfs")
    for name in ("lower", "upper", "work", "merged"):
        (folder / name).mkdir()
    options = b"lowerdir=%b/lower,upperdir=%b/upper,workdir=%b/work" % (path, path, path)
    call(libc.mount(b"overlay", path + b"/merged", b"overlay", 0, options), "mount overlay")
    yield 1
    call(libc.umount2(path + b"/merged", 0), "unmount overlay")
    call(libc.umount2(path, 0), "unmount tmpfs")


def a_deleted_file_of_more_than_256_mib():
    file = os.open(place("large"), os.O_TMPFILE | os.O_RDWR)
    os.posix_fallocate(file, 0, 257 << 20)
    yield os.getpid()
    os.close(file)


def a_fanotify_watch():
    fanotify = call(libc.fanotify_init(0x200, 0), "fanotify_init")  # FAN_REPORT_FID, which needs no privilege
    yield os.getpid()
    os.close(fanotify)


@as_root
def a_file_open_on_a_file_system_that_is_no_longer_mounted():
    folder = place("lost")
    call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=1m"), "mount tmpfs")
    file = open(folder / "file", "w")
    call(libc.umount2(os.fsencode(folder), 2), "detach tmpfs")
    yield os.getpid()
    file.close()


NAMESPACES = {
    "time": 0x00000080,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}


def attempt(work):
    """The name of the errno that `work`, a system call in a process of its own, ends with."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = work()
        if result == -1:
            os.write(write, errno.errorcode[ctypes.get_errno()].encode())
        else:
            os.write(write, b"made")
        os._exit(0)
    os.close(write)
    said = os.read(read, 100).decode()
    os.close(read)
    os.waitpid(pid, 0)
    return said


def attempts():
    """What answers what, on the way to what a dump could not take along."""
    numbers = {"x86_64": (323, 56), "aarch64": (282, 220)}[platform.machine()]
    nothing = ctypes.create_string_buffer(256)
    tried = {
        "io_uring": attempt(lambda: libc.syscall(425, 8, nothing)),
        "userfaultfd": attempt(lambda: libc.syscall(numbers[0], 1)),
        "clone3": attempt(lambda: libc.syscall(435, nothing, 64)),
    }
    # The machine's hypervisor, the kernel's ciphers, a neighbour by radio: anything but unix, inet, netlink and packet.
    for family in (getattr(socket, "AF_VSOCK", 40), 38, 29, 31, 44, 1 << 20):
        tried[f"socket {family}"] = attempt(lambda: libc.socket(family, socket.SOCK_STREAM, 0))
    for name, flag in NAMESPACES.items():
        tried[f"unshare {name}"] = attempt(lambda: libc.unshare(flag))
        if name != "time":  # whose bit means something else to clone
            tried[f"clone {name}"] = attempt(lambda: libc.syscall(numbers[1], flag | signal.SIGCHLD, 0, 0, 0, 0))
    return tried
