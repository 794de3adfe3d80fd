"""S3 by FUSE (contract novita.md, A7 28): a bucket is mounted as the guide does it, used, and in the way of a pause."""

import pytest
from novita_common import api, bare, until
from novita_sandbox.core import Sandbox

# A file system of one file, served by a program inside, as s3fs does it: libfuse's own wire, by /dev/fuse and fusermount3,
# with no bucket and no package to fetch. Answers INIT, LOOKUP, GETATTR, OPEN, READ, READDIR as far as `cat` and `ls` need.
SERVER = r'''
import array, ctypes, os, socket, struct, subprocess, sys
place = sys.argv[1]
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
subprocess.run(["fusermount3", "-o", "allow_other,fsname=bucket,subtype=s3fs", "--", place], env=environment, pass_fds=[theirs.fileno()], check=True)
_, extra, _, _ = ours.recvmsg(1, socket.CMSG_LEN(4))
device = struct.unpack("i", extra[0][2][:4])[0]
TEXT = b"in the bucket\n"
def attributes(node):
    kind, size, links = (0o040755, 0, 2) if node == 1 else (0o100644, len(TEXT), 1)
    return struct.pack("<QQQQQQIIIIIIIIII", node, size, 0, 0, 0, 0, 0, 0, 0, kind, links, 0, 0, 0, 4096, 0)
print("mounted", flush=True)
while True:
    try:
        request = os.read(device, 1 << 17)
    except OSError:
        break
    length, opcode, unique, node = struct.unpack("<IIQQ", request[:24])
    body, error, answer = request[40:], 0, b""
    if opcode == 26:
        answer = struct.pack("<IIIIHHIIHHIIIHH6I", 7, 31, 4096, 0, 0, 0, 65536, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)[:64].ljust(64, b"\0")
    elif opcode == 1:
        answer = struct.pack("<QQQQII", 2, 0, 1, 1, 0, 0) + attributes(2) if body.rstrip(b"\0") == b"file" else b""
        error = 0 if answer else -2
    elif opcode == 3:
        answer = struct.pack("<QII", 1, 0, 0) + attributes(node)
    elif opcode in (14, 27):
        answer = struct.pack("<QII", 0, 0, 0)
    elif opcode == 15:
        offset, size = struct.unpack("<QI", body[8:20])
        answer = TEXT[offset:offset + size]
    elif opcode == 28:
        offset = struct.unpack("<Q", body[8:16])[0]
        answer = b"" if offset else struct.pack("<QQII", 2, 1, 4, 8) + b"file".ljust(8, b"\0")
    elif opcode in (2, 42):
        continue
    elif opcode in (18, 25, 29):
        pass
    else:
        error = -38
    os.write(device, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)
'''


def mount(sandbox):
    sandbox.files.make_dir("/home/user/bucket")
    sandbox.files.write("/home/user/serve.py", SERVER)
    sandbox.commands.run("sudo python3 /home/user/serve.py /home/user/bucket", background=True, timeout=0)
    until(lambda: "fuse.s3fs" in sandbox.commands.run("cat /proc/mounts").stdout, "it is mounted")
    assert sandbox.commands.run("cat /home/user/bucket/file; ls /home/user/bucket").stdout == "in the bucket\nfile\n"


def test_a_fuse_mount_is_used_and_a_pause_is_refused_with_its_place(server):
    sandbox = Sandbox.create(timeout=60)
    mount(sandbox)
    with pytest.raises(Exception, match="422: .*fuse.s3fs mounted on /home/user/bucket; unmount it first"):
        sandbox.pause()
    assert sandbox.is_running()
    sandbox.commands.run("sudo umount /home/user/bucket")
    until(lambda: api(server, "POST", f"/sandboxes/{bare(sandbox.sandbox_id)}/pause")[0] == 204, "it can be paused", 5)
    sandbox.kill()


def test_a_pause_unmounts_where_the_configuration_says_so():
    from server import Server

    server = Server(**{"pause.unmount_fuse": "true"})
    try:
        server.start()
        environment = server.environment("novita")
        options = {"api_key": environment["NOVITA_API_KEY"], "api_url": environment["NOVITA_API_URL"], "sandbox_url": environment["NOVITA_API_URL"]}
        sandbox = Sandbox.create(timeout=60, **options)
        mount(sandbox)
        sandbox.pause()
        assert not sandbox.is_running()
        sandbox.connect()
        assert "fuse" not in sandbox.commands.run("cat /proc/mounts").stdout
        assert sandbox.commands.run("ls /home/user/bucket").stdout == ""
        sandbox.kill()
    finally:
        server.remove()
