"""Files in every state that an open one can be in, mappings, locks and watches."""

import errno
import fcntl
import hashlib
import mmap
import os
import pathlib
import select
import struct

from .ground import WAIT_S_MAX, Asked, as_root, call, libc, place, same


def a_deleted_file_that_is_open_keeps_its_bytes():
    path = place("deleted") / "file"
    data = os.urandom(8 << 20)
    file = open(path, "w+b")
    file.write(data)
    file.flush()
    path.unlink()
    while True:
        file.seek(4 << 20)
        yield
        same(file.tell(), 4 << 20, "the position")
        same(hashlib.sha256(os.pread(file.fileno(), len(data), 0)).digest(), hashlib.sha256(data).digest(), "the content")
        same(os.fstat(file.fileno()).st_nlink, 0, "its links")
        assert not path.exists(), "the deleted file is back"
        os.pwrite(file.fileno(), data, 0)


def a_file_without_a_name_keeps_its_bytes():
    file = os.open(place("nameless"), os.O_TMPFILE | os.O_RDWR)
    data = os.urandom(1 << 20)
    os.write(file, data)
    while True:
        yield
        same(os.pread(file, len(data), 0), data, "the content")
        os.pwrite(file, data, 0)


def a_file_of_the_template_stays_open_at_its_position():
    file = open("/usr/bin/git", "rb", buffering=0)
    expected = hashlib.sha256(pathlib.Path("/usr/bin/git").read_bytes()).digest()
    while True:
        file.seek(0)
        first = file.read(100_000)
        yield
        same(hashlib.sha256(first + file.read()).digest(), expected, "the content from the position on")


@as_root
def a_file_of_the_template_that_was_changed_or_replaced_stays_open():
    changed, replaced = (pathlib.Path("/usr/lib/python3.13") / name for name in ("this.py", "antigravity.py"))
    before = changed.read_bytes(), replaced.read_bytes()
    files = open(changed, "rb"), open(replaced, "rb")
    with open(changed, "ab") as writer:
        writer.write(b"# copied up\n")
    new = replaced.with_suffix(".new")
    new.write_bytes(b"# replaced\n")
    new.rename(replaced)
    while True:
        for file in files:
            file.seek(0)
        yield
        same(files[0].read()[: len(before[0])], before[0], "the descriptor of the changed file")
        same(files[1].read(), before[1], "the descriptor of the replaced file")
        same(changed.read_bytes(), before[0] + b"# copied up\n", "the changed file")
        same(replaced.read_bytes(), b"# replaced\n", "the replaced file")


def a_renamed_file_and_a_removed_working_directory_stay_open():
    folder = place("renamed")
    (folder / "old").write_bytes(b"renamed")
    file = open(folder / "old", "r+b", buffering=0)
    (folder / "old").rename(folder / "new")
    removed = folder / "removed"
    removed.mkdir()
    os.chdir(removed)
    removed.rmdir()
    while True:
        yield
        same(os.pread(file.fileno(), 100, 0), b"renamed", "the open file")
        same(os.fstat(file.fileno()).st_ino, (folder / "new").stat().st_ino, "the inode behind the new name")
        assert not (folder / "old").exists(), "the old name is back"
        same(os.listdir("."), [], "the working directory")
        same(os.stat(".").st_nlink, 0, "links of the working directory")
        assert not removed.exists(), "the removed folder is back"


def shared_mappings_of_files_and_of_memory_are_still_shared():
    folder = place("mapped")
    (folder / "file").write_bytes(bytes(8192))
    file = open(folder / "file", "r+b")
    deleted = open("/dev/shm/workloads-deleted", "w+b")
    deleted.truncate(8192)
    memory = os.memfd_create("workloads")
    os.truncate(memory, 8192)
    maps = {
        "a file": mmap.mmap(file.fileno(), 8192),
        "a deleted file of /dev/shm": mmap.mmap(deleted.fileno(), 8192),
        "a memfd": mmap.mmap(memory, 8192),
        "anonymous memory": mmap.mmap(-1, 8192),
    }
    os.unlink("/dev/shm/workloads-deleted")

    def add():
        for each in maps.values():
            each[5000] = (each[5000] + 1) % 200
        return [each[5000] for each in maps.values()]

    other = Asked(lambda: None, add)
    count = 0
    while True:
        count = (count + 2) % 200
        same(add(), [(count - 1) % 200] * 4, "what the parent sees")
        same(other.ask(), [count] * 4, "what the child sees")
        yield
        same([each[5000] for each in maps.values()], [count] * 4, f"bytes of {list(maps)}")
        same((folder / "file").read_bytes()[5000], count, "the file's byte")
        same(os.pread(deleted.fileno(), 1, 5000)[0], count, "the deleted file's byte")
        same(os.pread(memory, 1, 5000)[0], count, "the memfd's byte")


def locks_on_files_are_still_held():
    folder = place("locks")
    files = [open(folder / name, "w") for name in ("flock", "fcntl")]
    fcntl.flock(files[0], fcntl.LOCK_EX)
    fcntl.lockf(files[1], fcntl.LOCK_EX, 10, 5)

    def refused(lock):
        try:
            lock()
        except OSError as error:
            return errno.errorcode[error.errno]
        return "granted"

    def attempts():
        mine = [open(folder / name, "w") for name in ("flock", "fcntl")]
        flags = fcntl.LOCK_EX | fcntl.LOCK_NB
        return [
            refused(lambda: fcntl.flock(mine[0], flags)),
            refused(lambda: fcntl.lockf(mine[1], flags, 1, 14)),
            refused(lambda: fcntl.lockf(mine[1], flags, 1, 15)),
        ]

    other = Asked(lambda: None, attempts)
    while True:
        yield
        same(other.ask(), ["EAGAIN", "EAGAIN", "granted"], "another's locks (flock, inside the range, behind it)")


def inotify_goes_on_watching_files_and_folders():
    folder = place("inotify")
    (folder / "file").touch()
    inotify = call(libc.inotify_init1(os.O_NONBLOCK), "inotify_init1")
    in_folder = call(libc.inotify_add_watch(inotify, os.fsencode(folder), 0x100 | 0x200), "watch")  # created, deleted
    in_file = call(libc.inotify_add_watch(inotify, os.fsencode(folder / "file"), 0x2), "watch")  # modified
    while True:
        yield
        (folder / "new").touch()
        (folder / "new").unlink()
        (folder / "file").write_text("modified")
        events = []
        expected = {(in_folder, 0x100), (in_folder, 0x200), (in_file, 0x2)}
        events = set()
        while not expected <= events and select.select([inotify], [], [], WAIT_S_MAX)[0]:
            data = os.read(inotify, 65536)
            while data:
                watch, mask, _, size = struct.unpack_from("iIII", data)
                events.add((watch, mask))
                data = data[16 + size :]
        same(events, expected, "events")
