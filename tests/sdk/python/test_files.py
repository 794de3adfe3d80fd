import hashlib
import io
import os
import time
import urllib.error
import urllib.request

import pytest
from e2b import FileType, InvalidArgumentException, NotFoundException, WriteInfo
from e2b.exceptions import NotEnoughSpaceException


def test_text_and_bytes_come_back_as_written(sandbox):
    sandbox.files.write("notes/today.txt", "grüß dich")
    assert sandbox.files.read("notes/today.txt") == "grüß dich"
    blob = os.urandom(3_000_000)
    sandbox.files.write("/tmp/blob", io.BytesIO(blob))
    assert bytes(sandbox.files.read("/tmp/blob", format="bytes")) == blob


def test_a_written_file_belongs_to_the_user_and_its_new_folders_too(sandbox):
    sandbox.files.write("/home/user/new/folder/file", "x")
    shown = sandbox.commands.run("stat -c '%U:%G %a' new new/folder new/folder/file").stdout
    assert shown == "user:user 755\nuser:user 755\nuser:user 644\n"


def test_many_files_are_written_in_one_call(sandbox):
    written = sandbox.files.write_files([{"path": f"many/{i}", "data": str(i)} for i in range(50)])
    assert len(written) == 50 and isinstance(written[0], WriteInfo)
    assert sandbox.files.read("many/49") == "49"


def test_a_rewritten_file_keeps_its_mode_and_loses_its_tail(sandbox):
    sandbox.files.write("script", "a long line")
    sandbox.commands.run("chmod 755 script")
    sandbox.files.write("script", "short")
    assert sandbox.files.read("script") == "short"
    assert sandbox.commands.run("stat -c %a script").stdout == "755\n"


def test_info_list_rename_and_remove(sandbox):
    sandbox.files.make_dir("d/e")
    assert sandbox.files.make_dir("d/e") is False
    sandbox.files.write("d/f", "12345")
    sandbox.commands.run("ln -s f d/link")
    info = sandbox.files.get_info("d/f")
    assert (info.name, info.type, info.size, info.mode, info.permissions, info.owner) == ("f", FileType.FILE, 5, 0o644, "-rw-r--r--", "user")
    assert sandbox.files.get_info("d/link").symlink_target == "/home/user/d/f"
    assert [entry.path for entry in sandbox.files.list("d")] == ["/home/user/d/e", "/home/user/d/f", "/home/user/d/link"]
    assert {entry.name for entry in sandbox.files.list("/home/user", depth=2)} >= {"d", "e", "f"}
    sandbox.files.rename("d/f", "d/g")
    assert not sandbox.files.exists("d/f") and sandbox.files.read("d/g") == "12345"
    sandbox.files.remove("d")
    assert not sandbox.files.exists("d")


def test_missing_files_and_folders_in_the_way_are_named(sandbox):
    with pytest.raises(NotFoundException, match="nothing-here"):
        sandbox.files.read("nothing-here")
    sandbox.files.make_dir("folder")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read("folder")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write("folder", "x")
    with pytest.raises(NotFoundException):
        sandbox.files.list("nothing-here")


def test_a_kernel_file_of_size_zero_is_read(sandbox):
    assert len(sandbox.files.read("/proc/sys/kernel/random/boot_id").strip()) == 36


def test_watching_a_folder_sees_what_happens_in_it(sandbox):
    sandbox.files.make_dir("watched")
    handle = sandbox.files.watch_dir("watched", recursive=True)
    sandbox.files.write("watched/file", "x")
    sandbox.files.write("watched/sub/inner", "x")
    sandbox.files.remove("watched/file")
    events = [(event.name, event.type.value) for event in handle.get_new_events()]
    assert events[:3] == [("file", "create"), ("file", "chmod"), ("file", "write")], events
    assert ("sub", "create") in events and ("sub/inner", "create") in events and ("file", "remove") in events, events
    handle.stop()


def test_signed_urls_open_one_file_for_a_while(sandbox):
    sandbox.files.write("report.txt", "the report")
    with urllib.request.urlopen(sandbox.download_url("report.txt", user="user")) as answer:
        assert answer.read() == b"the report"
    expired = sandbox.download_url("report.txt", user="user", use_signature_expiration=-10)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(expired)
    assert refused.value.code == 401
    forged = sandbox.download_url("report.txt", user="user").replace("report.txt", "other.txt")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(forged)
    assert refused.value.code in (400, 401, 404)


def test_a_file_larger_than_the_disk_says_so_and_the_sandbox_lives_on(server):
    """The disk is 20 GiB and sparse: a file that claims the rest of it leaves no room."""
    from e2b import Sandbox

    with Sandbox.create() as sandbox:
        sandbox.commands.run("fallocate -l $(( $(df -B1 --output=avail / | tail -1) - 4194304 )) big", timeout=60)
        with pytest.raises(NotEnoughSpaceException):
            sandbox.files.write("more", b"x" * 16_000_000)
        sandbox.commands.run("rm -f big more")
        sandbox.files.write("more", "fits")


def test_a_large_upload_streams_and_arrives_whole(sandbox):
    blob = os.urandom(1 << 20) * 64
    started = time.monotonic()
    sandbox.files.write("/tmp/large", blob)
    shown = sandbox.commands.run("sha256sum /tmp/large | cut -d' ' -f1").stdout.strip()
    assert shown == hashlib.sha256(blob).hexdigest()
    assert time.monotonic() - started < 60
