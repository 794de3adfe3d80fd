"""Roots and mounts of a program's own."""

import os

from .ground import Asked, as_root, call, libc, place, same


@as_root
def a_chroot_stays_one():
    root = place("chroot")
    (root / "inside").write_text("inside the root")

    def prepare():
        os.chroot(root)
        os.chdir("/")

    rooted = Asked(prepare, lambda: [os.listdir("/"), os.getcwd(), open("/inside").read()])
    while True:
        yield
        same(rooted.ask(), [["inside"], "/", "inside the root"], "what it sees")


@as_root
def a_mount_namespace_of_the_programs_own_keeps_its_mounts():
    folder = place("namespace")
    (folder / "outside").touch()

    def prepare():
        call(libc.unshare(0x00020000), "unshare")
        call(libc.mount(b"none", b"/", None, (1 << 18) | (1 << 14), None), "private")  # MS_PRIVATE, MS_REC
        call(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=1m"), "mount")
        (folder / "inside").write_text("on the tmpfs")

    inner = Asked(prepare, lambda: [os.listdir(folder), (folder / "inside").read_text()])
    while True:
        yield
        same(os.listdir(folder), ["outside"], "what everybody sees")
        same(inner.ask(), [["inside"], "on the tmpfs"], "what its namespace sees")


@as_root
def a_tmpfs_and_a_bind_mount_made_inside_are_there_again():
    folder = place("mounts")
    for name in ("tmpfs", "bind", "source"):
        (folder / name).mkdir()
    (folder / "source" / "file").write_text("bound")
    call(libc.mount(b"tmpfs", os.fsencode(folder / "tmpfs"), b"tmpfs", 0, b"size=2m,mode=700"), "mount tmpfs")
    call(libc.mount(os.fsencode(folder / "source"), os.fsencode(folder / "bind"), None, 4096, None), "bind")
    data = os.urandom(1 << 20)
    (folder / "tmpfs" / "file").write_bytes(data)
    file = open(folder / "tmpfs" / "file", "rb")
    before = [line.split()[4:6] for line in open("/proc/self/mountinfo") if str(folder) in line]
    while True:
        file.seek(0)
        yield
        now = [line.split()[4:6] for line in open("/proc/self/mountinfo") if str(folder) in line]
        same(sorted(now), sorted(before), "mounts")
        same((folder / "tmpfs" / "file").read_bytes(), data, "the file on the tmpfs")
        same(file.read(), data, "the open file on the tmpfs")
        same((folder / "bind" / "file").read_text(), "bound", "the file behind the bind mount")
