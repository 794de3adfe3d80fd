"""Volumes as E2B's SDK uses them: made, mounted in several sandboxes, read and written without any."""

import datetime
import io
import pathlib
import tempfile
import time
import uuid

import pytest
from e2b import Sandbox
from server import Server

Volume = getattr(pytest.importorskip("e2b"), "Volume", None)
pytestmark = pytest.mark.skipif(Volume is None, reason="this SDK has no volumes")


@pytest.fixture
def volume(server):
    volume = Volume.create(f"test-{uuid.uuid4()}")
    yield volume
    Volume.destroy(volume.volume_id)


def test_what_one_sandbox_writes_another_reads_and_nobody_removes_it_meanwhile(volume):
    writer = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    try:
        writer.files.write("/mnt/data/hello.txt", "written by the writer")
        reader = Sandbox.create(timeout=120, volume_mounts={"/srv/data": volume.name})
        try:
            assert reader.files.read("/srv/data/hello.txt") == "written by the writer"
            assert [(mount.name, mount.path) for mount in mounts_of(reader)] == [(volume.name, "/srv/data")]
            assert "10G" in reader.commands.run("df -h --output=size /srv/data").stdout.replace("9.8G", "10G")
            with pytest.raises(Exception, match="is mounted in sandbox"):
                Volume.destroy(volume.volume_id)
        finally:
            reader.kill()
    finally:
        writer.kill()
    assert volume.read_file("/hello.txt") == "written by the writer"
    later = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    try:
        assert later.files.read("/mnt/data/hello.txt") == "written by the writer"
    finally:
        later.kill()


def mounts_of(sandbox):
    mounts = sandbox.get_info().volume_mounts
    return [type("Mount", (), mount) if isinstance(mount, dict) else mount for mount in mounts]


def test_an_open_file_on_a_volume_goes_on_after_a_pause_and_in_a_fork(volume):
    sandbox = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    copies = []
    try:
        loop = "import time\nwith open('/mnt/data/log', 'a', buffering=1) as log:\n  for n in range(100000):\n    print(n, file=log)\n    time.sleep(0.02)"
        sandbox.commands.run(f'python3 -c "{loop}"', background=True)
        time.sleep(0.3)
        sandbox.pause()
        before = volume.read_file("/log").splitlines()
        volume.write_file("/other", "written during the pause")
        sandbox.connect()
        assert sandbox.files.read("/mnt/data/other") == "written during the pause"
        wait_until(lambda: len(volume.read_file("/log").splitlines()) > len(before) + 5)
        after = volume.read_file("/log").splitlines()
        assert after[: len(before)] == before and after[len(before)] == str(int(before[-1]) + 1)
        fork = getattr(sandbox, "fork", None)
        if fork is not None:
            copies = fork(count=2)
            copies = [getattr(copy, "sandbox", copy) for copy in copies]
            for number, copy in enumerate(copies):
                copy.files.write(f"/mnt/data/copy-{number}", "here")
            assert {entry.name for entry in sandbox.files.list("/mnt/data")} >= {"copy-0", "copy-1"}
    finally:
        for each in [sandbox, *copies]:
            each.kill()


def test_a_file_that_is_removed_from_a_volume_during_a_pause_is_named_and_nothing_is_lost(volume):
    sandbox = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    try:
        sandbox.commands.run("cd /mnt/data && echo first > kept && echo second > ghost && mkdir folder && cat kept > folder/deep")
        # An open file, a deleted one and a working folder; `back` is read through the open file.
        hold = "exec 3<>kept 4<ghost && rm ghost && cd folder && touch /tmp/holds && until test -e /tmp/go; do sleep 0.05; done && cat <&4 > /tmp/said && cat <&3 >> /tmp/said"
        sandbox.commands.run(f"cd /mnt/data && {hold}", background=True)
        sandbox.commands.run("until test -e /tmp/holds; do sleep 0.02; done")
        snapshot = sandbox.create_snapshot()
        sandbox.pause()
        volume.remove("/kept")
        for _again in range(2):
            with pytest.raises(Exception, match="409: .*'/mnt/data/kept' was open on a volume, .*No such file or directory; put it back, or .*memory: false"):
                sandbox.connect()
        with pytest.raises(Exception, match="409: '/mnt/data/kept' is open on a volume"):
            Sandbox.create(snapshot.snapshot_id, timeout=60)
        Sandbox.delete_snapshot(snapshot.snapshot_id)
        assert [info.state.value for info in Sandbox.list(limit=100).next_items() if info.sandbox_id == sandbox.sandbox_id] == ["paused"]
        volume.write_file("/kept", "written anew\n")
        volume.remove("/folder")
        with pytest.raises(Exception, match="'/mnt/data/folder' was open on a volume"):
            sandbox.connect()
        volume.make_dir("/folder")
        sandbox.connect()
        sandbox.commands.run("touch /tmp/go; until grep -q written /tmp/said; do sleep 0.02; done")
        assert sandbox.files.read("/tmp/said") == "second\nwritten anew\n"
    finally:
        sandbox.kill()


@pytest.fixture
def hosts_folder():
    """A folder of the host's that everybody may look into: pytest's own are below one that nobody may."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        pathlib.Path(folder).chmod(0o755)
        yield pathlib.Path(folder)


def test_a_folder_of_a_volume_that_became_a_link_leads_no_mount_out_of_the_sandbox(volume, hosts_folder):
    for folder in ("source", "place"):
        (hosts_folder / folder).mkdir()
    (hosts_folder / "source" / "file").write_text("the host's")
    sandbox = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    other = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    try:
        made = "cd /mnt/data && mkdir -p a/source b/place /mnt/bound && echo inside > a/source/file"
        sandbox.commands.run(f"{made} && mount --bind a/source /mnt/bound && mount -t tmpfs none b/place", user="root")
        sandbox.pause()
        for folder, place in (("a", "/mnt/bound"), ("b", "/mnt/data/b/place")):
            other.commands.run(f"cd /mnt/data && mv {folder} aside && ln -s {hosts_folder} {folder}")
            with pytest.raises(Exception, match=f"409: .*'{place}' was open on a volume, .*Too many levels of symbolic links"):
                sandbox.connect()
            other.commands.run(f"cd /mnt/data && rm {folder} && mv aside {folder}")
        sandbox.connect()
        assert sandbox.commands.run("cat /mnt/bound/file && findmnt -no FSTYPE /mnt/data/b/place").stdout == "inside\ntmpfs\n"
    finally:
        sandbox.kill()
        other.kill()


def wait_until(is_so, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def test_a_snapshot_brings_its_volumes(volume):
    sandbox = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    try:
        sandbox.files.write("/mnt/data/file", "of the source")
        snapshot = sandbox.create_snapshot()
    finally:
        sandbox.kill()
    try:
        with pytest.raises(Exception, match="is mounted in snapshot"):
            Volume.destroy(volume.volume_id)
        with pytest.raises(Exception, match="is taken by volume"):
            Sandbox.create(snapshot.snapshot_id, timeout=60, volume_mounts={"/mnt/data": volume})
        copy = Sandbox.create(snapshot.snapshot_id, timeout=120)
        try:
            assert copy.files.read("/mnt/data/file") == "of the source"
        finally:
            copy.kill()
    finally:
        Sandbox.delete_snapshot(snapshot.snapshot_id)


def test_volumes_are_listed_found_and_removed(server):
    name = f"listed-{uuid.uuid4()}"
    made = Volume.create(name)
    try:
        assert made.name == name and made.token
        assert any((info.volume_id, info.name) == (made.volume_id, name) for info in Volume.list())
        info = Volume.get_info(made.volume_id)
        assert (info.name, info.token) == (name, made.token)
        assert Volume.connect(made.volume_id).list("/") == []
        with pytest.raises(Exception, match="exists already"):
            Volume.create(name)
        with pytest.raises(Exception, match="no volume name"):
            Volume.create("a name")
    finally:
        assert Volume.destroy(made.volume_id) is True
    assert Volume.destroy(made.volume_id) is False
    with pytest.raises(Exception, match="not found"):
        Volume.get_info(made.volume_id)


def test_mounts_that_make_no_sense_are_refused(server, volume):
    before = set(server.leftovers())
    for mounts, why in [
        ({"/mnt/a": "no-such-volume"}, "invalid mounts"),
        ({"relative": volume}, "not absolute"),
        ({"/a/../b": volume}, "not clean"),
        ({"/proc/x": volume}, "would cover /proc"),
        ({"/etc/passwd": volume}, "400: .*'/etc/passwd': '/etc/passwd' is not a folder"),
        ({"/etc/passwd/x": volume}, "400: .*'/etc/passwd/x': '/etc/passwd' is not a folder"),
        ({"/bin/sh": volume}, "400: .*'/bin/sh' is not a folder"),
        ({"/etc/alternatives/awk/x": volume}, "400: .*'/etc/alternatives/awk' is not a folder"),
        ({"/" + "x" * 256: volume}, "400: .*longer than 255 bytes"),
    ]:
        with pytest.raises(Exception, match=why):
            Sandbox.create(timeout=60, volume_mounts=mounts)
    # The volume is free to be destroyed when the test ends, and nothing else is left of them.
    assert set(server.leftovers()) <= before


def test_files_are_written_read_listed_and_changed_without_a_sandbox(volume):
    written = volume.write_file("/a.txt", "text")
    assert (written.name, written.path, written.size, written.type.value) == ("a.txt", "/a.txt", 4, "file")
    assert isinstance(written.mtime, datetime.datetime) and isinstance(written.ctime, datetime.datetime)
    with pytest.raises(Exception, match="exists already"):
        volume.write_file("/a.txt", "other")
    volume.write_file("/a.txt", b"\x00\xff" * 100_000, force=True)
    assert volume.read_file("/a.txt", format="bytes") == b"\x00\xff" * 100_000
    volume.write_file("/stream", io.BytesIO(b"x" * 3_000_000), uid=1001, gid=1002, mode=0o640)
    assert b"".join(volume.read_file("/stream", format="stream")) == b"x" * 3_000_000
    info = volume.get_info("/stream")
    assert (info.uid, info.gid, info.mode, info.size) == (1001, 1002, 0o640, 3_000_000)
    volume.write_file("/empty", "")
    assert volume.read_file("/empty") == ""

    made = volume.make_dir("/folder", uid=1000, gid=1000, mode=0o755)
    assert (made.type.value, made.mode, made.uid) == ("directory", 0o755, 1000)
    with pytest.raises(Exception, match="exists already"):
        volume.make_dir("/folder")
    assert volume.make_dir("/folder", force=True).path == "/folder"
    with pytest.raises(Exception, match="not found"):
        volume.make_dir("/x/y/z")
    volume.make_dir("/x/y/z", force=True)
    volume.write_file("/x/y/z/deep", "deep")
    assert [entry.path for entry in volume.list("/x", depth=3)] == ["/x/y", "/x/y/z", "/x/y/z/deep"]
    assert {entry.name for entry in volume.list("/")} == {"a.txt", "stream", "empty", "folder", "x"}
    updated = volume.update_metadata("/a.txt", uid=7, gid=8, mode=0o600)
    assert (updated.uid, updated.gid, updated.mode) == (7, 8, 0o600)
    volume.remove("/x")
    assert not volume.exists("/x") and volume.exists("/folder")
    for call in (volume.remove, volume.read_file, volume.list, volume.get_info):
        with pytest.raises(Exception, match="not found"):
            call("/nothing")


def test_links_that_a_sandbox_plants_lead_nowhere_else(volume):
    sandbox = Sandbox.create(timeout=120, volume_mounts={"/mnt/data": volume})
    try:
        plant = "cd /mnt/data && ln -s /etc/passwd file && ln -s / folder && ln -s ../../../.. up && mkfifo fifo && echo inside > real && ln -s /real good"
        sandbox.commands.run(plant)
        assert volume.get_info("/file").type.value == "symlink" and volume.get_info("/file").target == "/etc/passwd"
        with pytest.raises(Exception, match="not found"):
            volume.read_file("/file")
        assert {entry.name for entry in volume.list("/folder")} == {"file", "folder", "up", "fifo", "real", "good"}
        assert {entry.name for entry in volume.list("/up")} == {entry.name for entry in volume.list("/")}
        assert volume.read_file("/up/../folder/good") == "inside\n"
        with pytest.raises(Exception, match="not a regular file"):
            volume.read_file("/fifo")
        volume.write_file("/folder/etc/passwd", "of the volume", force=True)
        assert volume.read_file("/etc/passwd") == "of the volume"
        volume.remove("/up")
        assert volume.exists("/real")
    finally:
        sandbox.kill()


def test_the_token_of_one_volume_opens_no_other(volume):
    other = Volume.create(f"other-{uuid.uuid4()}")
    try:
        stolen = Volume(volume.volume_id, volume.name, token=other.token)
        for token in (other.token, "", "x", volume.token[:-1]):
            with pytest.raises(Exception, match="401|not the volume's token"):
                Volume(volume.volume_id, volume.name, token=token).list("/")
        assert stolen.volume_id == volume.volume_id
    finally:
        Volume.destroy(other.volume_id)


def test_a_killed_server_is_followed_by_one_that_finds_the_volumes_as_they_were():
    server = Server()
    try:
        server.start()
        options = {"api_key": server.environment()["E2B_API_KEY"], "api_url": f"http://127.0.0.1:{server.port}"}
        volume = Volume.create("kept", **options)
        places = {"sandbox_url": options["api_url"], **options}
        running = Sandbox.create(timeout=300, volume_mounts={"/mnt/data": volume}, **places)
        paused = Sandbox.create(timeout=300, volume_mounts={"/mnt/data": volume}, **places)
        paused.pause()
        running.files.write("/mnt/data/before", "the kill")
        server.kill9()
        server.start()
        assert running.files.read("/mnt/data/before") == "the kill"
        running.files.write("/mnt/data/after", "it too")
        again = Sandbox.connect(paused.sandbox_id, **places)
        assert again.files.read("/mnt/data/after") == "it too"
        assert volume.read_file("/after", api_url=options["api_url"]) == "it too"
        listed = server.cli("volume", "ls").stdout
        assert "kept" in listed and volume.volume_id in listed and "10 GiB" in listed, listed
        assert "in volumes" in server.cli("df").stdout
        refused = server.cli("volume", "rm", "kept", check=False)
        assert refused.returncode == 1 and "is mounted in sandbox" in refused.stderr
        for sandbox in (running, again):
            sandbox.kill()
        made = server.cli("volume", "create", "second", "--size", "64 MiB").stdout.strip()
        assert server.cli("volume", "rm", "kept", made).stdout == f"removed kept\nremoved {made}\n"
        server.stop()
        assert server.leftovers() == [] and list((server.data_dir / "volumes").iterdir()) == []
        assert str(server.data_dir / "volumes") not in pathlib.Path("/proc/self/mountinfo").read_text()
    finally:
        server.remove()
