"""Volumes as Novita's newest SDK uses them: with a quota, and mounted while a sandbox runs."""

import uuid

import pytest

novita = pytest.importorskip("novita_sandbox.core")
Sandbox, Volume = novita.Sandbox, getattr(novita, "Volume", None)
pytestmark = pytest.mark.skipif(Volume is None, reason="this SDK has no volumes")


@pytest.fixture
def volume(server):
    volume = Volume.create(f"test-{uuid.uuid4().hex[:8]}", quota_size_gib=1)
    yield volume
    Volume.destroy(volume.volume_id)


def test_a_mounted_volume_is_used_and_not_destroyed(volume):
    sandbox = Sandbox.create(timeout=60, volume_mounts={"/mnt/vol": volume})
    try:
        sandbox.commands.run("mkdir -p /mnt/vol/a/b/c && echo hello > /mnt/vol/hello.txt")
        assert sandbox.commands.run("cat /mnt/vol/hello.txt; test -d /mnt/vol/a/b/c && echo ok").stdout == "hello\nok\n"
        assert [mount["path"] for mount in sandbox.get_info().volume_mounts] in (["/mnt/vol"], [])
        with pytest.raises(Exception, match="mounted"):
            Volume.destroy(volume.volume_id)
    finally:
        sandbox.kill()


def test_the_quota_is_shown_and_grows(volume):
    info = Volume.get_info(volume.volume_id)
    assert (info.name, info.quota_size_gib) == (volume.name, 1) and info.token
    updated = Volume.update_quota(volume.volume_id, quota_size_gib=3)
    assert updated.quota_size_gib == 3 and updated.used_size_bytes >= 0
    listed = [other for other in Volume.list() if other.volume_id == volume.volume_id]
    assert [other.quota_size_gib for other in listed] == [3]
    with pytest.raises(Exception, match="cannot shrink"):
        Volume.update_quota(volume.volume_id, quota_size_gib=2)
    with pytest.raises(Exception, match="not found"):
        Volume.update_quota(str(uuid.uuid4()), quota_size_gib=2)
    sandbox = Sandbox.create(timeout=60, volume_mounts={"/mnt/vol": volume})
    try:
        size = int(sandbox.commands.run("df --output=size -k /mnt/vol | tail -1").stdout)
        assert 2 << 20 < size <= 3 << 20, size
    finally:
        sandbox.kill()


def test_links_inside_lead_a_volume_to_folders_where_it_may_be_and_nowhere_else(volume):
    sandbox = Sandbox.create(timeout=60)
    try:
        sandbox.commands.run("sudo mkdir /srv/real && cd /srv && sudo ln -s real good && sudo ln -s nothing lost && sudo ln -s circle circle"
                             " && sudo ln -s /proc kernel && sudo ln -s /run up && sudo ln -s / root && sudo ln -s /etc/passwd file")
        for path, why in [
            ("/srv/lost", "'/srv/lost' is a symbolic link that leads nowhere"),
            ("/srv/circle", "'/srv/circle' is a symbolic link that leads in a circle"),
            ("/srv/file", "'/srv/file' is not a folder"),
            ("/srv/file/x", "'/srv/file' is not a folder"),
            ("/srv/kernel", "a symbolic link leads elsewhere, and the mount path '/proc' would cover /proc"),
            ("/srv/kernel/sys", "the mount path '/proc/sys' would cover /proc"),
            ("/srv/kernel/x", "the folder '/srv/kernel/x' cannot be made"),
            ("/srv/up", "the mount path '/run' would cover /run/stillbox"),
            ("/srv/root", "the root of everything"),
            ("/srv/root/dev/shm", "the mount path '/dev/shm' would cover /dev"),
        ]:
            with pytest.raises(Exception, match=f"no volume can be mounted at '{path}': .*{why}"):
                sandbox.mount_volume(volume.name, path)
        assert sandbox.get_info().volume_mounts in ([], None)
        sandbox.mount_volume(volume.name, "/srv/good")
        assert sandbox.commands.run("touch /srv/real/file; findmnt -no TARGET -T /srv/good").stdout == "/srv/real\n"
        sandbox.unmount_volume("/srv/good")
        assert sandbox.commands.run("ls /srv/real").stdout == ""
    finally:
        sandbox.kill()
    with pytest.raises(Exception, match="no volume can be mounted at '/etc/passwd': '/etc/passwd' is not a folder"):
        Sandbox.create(timeout=60, volume_mounts={"/etc/passwd": volume})


def test_a_volume_comes_to_a_running_sandbox_and_leaves_it(volume):
    sandbox = Sandbox.create(timeout=60)
    try:
        sandbox.mount_volume(volume.name, "/mnt/late")
        sandbox.commands.run("echo late > /mnt/late/file")
        with pytest.raises(Exception, match="has a volume already"):
            sandbox.mount_volume(volume.name, "/mnt/late")
        with pytest.raises(Exception, match="does not exist"):
            sandbox.mount_volume("nobody", "/mnt/other")
        holder = sandbox.commands.run("cd /mnt/late && touch /tmp/holds && sleep 60", background=True)
        sandbox.commands.run("until test -e /tmp/holds; do sleep 0.01; done")
        with pytest.raises(Exception, match="in use"):
            sandbox.unmount_volume("/mnt/late")
        sandbox.unmount_volume("/mnt/late", force=True)
        holder.kill()
        assert sandbox.commands.run("ls /mnt/late").stdout == ""
        with pytest.raises(Exception, match="no volume is mounted"):
            sandbox.unmount_volume("/mnt/late")
        sandbox.mount_volume(volume.name, "/srv/again")
        sandbox.pause()
        sandbox.connect()
        assert sandbox.commands.run("cat /srv/again/file").stdout == "late\n"
        copies = Sandbox.clone(sandbox.sandbox_id, 1)
        try:
            assert copies.sandboxes[0].commands.run("cat /srv/again/file").stdout == "late\n"
        finally:
            copies.sandboxes[0].kill()
    finally:
        sandbox.kill()
    # What the copies came from stays, with the volume, until it is deleted.
    with pytest.raises(Exception, match=f"is mounted in snapshot {copies.snapshot_template_id}"):
        Volume.destroy(volume.volume_id)
    assert Sandbox.delete_snapshot(copies.snapshot_template_id)
