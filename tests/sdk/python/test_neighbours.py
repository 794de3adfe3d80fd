"""What one sandbox takes its neighbours still have, and what would make a pause take minutes is refused at once."""

import pytest
from e2b import Sandbox
from test_create import api

# More than the kernel's own 4096 terminals, and 65536 events of asynchronous I/O (io_setup).
TAKE = {
    "terminals": """
import os, subprocess
for number in range(36):
    folder = f"/mnt/pts{number}"
    os.makedirs(folder)
    subprocess.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666,max=1000", "devpts", folder], check=True)
    for _ in range(100):
        os.open(f"{folder}/ptmx", os.O_RDWR | os.O_NOCTTY)
""",
    "events": """
import ctypes
for _ in range(72):
    assert ctypes.CDLL(None).syscall(206, 1000, ctypes.byref(ctypes.c_ulong(0))) == 0
""",
}
NEED = {
    "terminals": "import os; os.openpty()",
    "events": "import ctypes; assert ctypes.CDLL(None).syscall(206, 1000, ctypes.byref(ctypes.c_ulong(0))) == 0",
}


@pytest.mark.parametrize("what", TAKE)
def test_one_sandbox_cannot_take_all_that_the_kernel_has_of(sandbox, what):
    greedy = Sandbox.create(timeout=120)
    try:
        greedy.files.write("/tmp/take.py", TAKE[what] + "\nopen('/tmp/taken', 'w').close()\nimport time; time.sleep(60)\n")
        greedy.commands.run("python3 /tmp/take.py > /tmp/said 2>&1", user="root", background=True, timeout=0)
        took = "for i in $(seq 100); do test -e /tmp/taken && exit; sleep 0.1; done; cat /tmp/said; exit 1"
        assert greedy.commands.run(took).exit_code == 0
        assert sandbox.commands.run(f"python3 -c '{NEED[what]}'").exit_code == 0
    finally:
        greedy.kill()


HOARDS = {
    "processes": ("for i in $(seq 1010); do sleep 60 & done; touch /tmp/ready; wait", "more than 1000 processes"),
    "shared memory": (
        "python3 -c 'import mmap, time; kept = [mmap.mmap(-1, 4096, prot=1 + i % 2 * 2) for i in range(4010)];"
        ' open("/tmp/ready", "w"); time.sleep(60)\'',
        "more than 4000",
    ),
    "mounts": ("for i in $(seq 201); do mkdir -p /m/$i; mount -t tmpfs none /m/$i; done; touch /tmp/ready", "more than 200"),
    "what a resume needs": ("mv /run /run.old; mkdir /run; touch /tmp/ready", "no plain /run/stillbox/boot_id"),
}


@pytest.mark.parametrize("what", HOARDS)
def test_a_pause_that_would_take_minutes_or_could_not_be_undone_is_refused_for(server, sandbox, what):
    hoard, reason = HOARDS[what]
    sandbox.commands.run(hoard, user="root", background=True, timeout=0)
    assert sandbox.commands.run("for i in $(seq 200); do test -e /tmp/ready && exit; sleep 0.1; done; exit 1").exit_code == 0
    status, body = api(server, "POST", f"/sandboxes/{sandbox.sandbox_id}/pause", {})
    assert status == 409 and reason in body["message"], body
    assert sandbox.commands.run("echo on").stdout == "on\n"
