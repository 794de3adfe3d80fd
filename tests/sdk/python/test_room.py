"""A host whose disk runs low: who runs goes on and loses nothing, nobody takes what is left, and all is well afterwards."""

import os
import shutil
import time

import pytest
from e2b import Sandbox, Volume
from server import Server

GIB = 1 << 30


@pytest.fixture
def low():
    """A server, and a switch that leads the disk below what is to be kept free, or back."""
    server = Server()
    free = shutil.disk_usage(server.data_dir).free
    if free < 8 * GIB:
        pytest.skip("others need what is left of this disk")
    # Others write to the same disk meanwhile.
    server.settings["runtime.disk_free_min"] = f"{(free - 3 * GIB) >> 20} MiB"
    ballast = server.data_dir.with_suffix(".ballast")

    def turn(on):
        seen = server.log().count("are free again")
        told = server.log().count("are kept free (runtime.disk_free_min)")
        if on:
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * GIB)
        else:
            ballast.unlink(missing_ok=True)
        if server.process.poll() is None:
            wait_until(lambda: server.log().count("are kept free (runtime.disk_free_min)") > told if on else server.log().count("are free again") > seen)

    try:
        yield server, turn
    finally:
        ballast.unlink(missing_ok=True)
        server.remove()


def wait_until(is_so, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def write(sandbox, path, mib):
    return sandbox.commands.run(f"dd if=/dev/zero of={path} bs=1M count={mib} 2>&1; rm -f {path}").stdout


def test_a_host_disk_that_runs_low_is_left_to_nobody_and_costs_nobody_anything(low):
    server, turn = low
    server.start()
    options = {"api_key": server.environment()["E2B_API_KEY"], "api_url": f"http://127.0.0.1:{server.port}"}
    places = {"sandbox_url": options["api_url"], **options}
    volume = Volume.create("shared", **options)
    running = Sandbox.create(timeout=300, volume_mounts={"/mnt/data": volume}, **places)
    paused = Sandbox.create(timeout=300, **places)
    paused.pause()
    running.files.write("/home/user/small", "before")

    turn(on=True)
    refused = "507: .*disk space below .* is used up: .*runtime.disk_free_min"
    for ask in (
        lambda: Sandbox.create(timeout=60, **places),
        lambda: Sandbox.connect(paused.sandbox_id, **places),
        lambda: running.pause(),
        lambda: running.create_snapshot(),
    ):
        with pytest.raises(Exception, match=refused):
            ask()
    assert f"largest: sandbox {running.sandbox_id}" in server.log() or f"sandbox {running.sandbox_id} " in server.log()
    for path in ("/home/user/big", "/mnt/data/big"):
        assert "No space left on device" in write(running, path, 64)
    running.files.write("/home/user/small", "meanwhile")
    assert running.commands.run("cat /home/user/small").stdout == "meanwhile"
    assert "running sandboxes find their disks full" in server.cli("df").stdout
    assert "are kept free" in server.cli("doctor", check=False).stdout

    # Nothing of this is remembered by the next server, which finds room.
    server.kill9()
    turn(on=False)
    server.start()
    for path in ("/home/user/big", "/mnt/data/big"):
        wait_until(lambda path=path: "No space left on device" not in write(running, path, 64))
    turn(on=True)
    assert "No space left on device" in write(running, "/home/user/big", 64)
    turn(on=False)
    assert "No space left on device" not in write(running, "/home/user/big", 64)
    assert Sandbox.connect(paused.sandbox_id, **places).commands.run("echo on").stdout == "on\n"
    running.pause()
    assert running.connect().files.read("/home/user/small") == "meanwhile"
    for sandbox in (running, paused, Sandbox.create(timeout=60, **places)):
        sandbox.kill()
    assert Volume.destroy(volume.volume_id, **options)
