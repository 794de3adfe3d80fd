"""The peer that stops time as well: `podman run`, `podman container checkpoint` and `restore`, on runc and the layer that
the sandboxes use."""

import os
import pathlib
import shutil
import subprocess
import tempfile

# The ones that are inherited may be above what a machine without CAP_SYS_RESOURCE lets it set.
LIMITS = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]


class NoPeer(Exception):
    """Why podman is left out, in one line."""


class Podman:
    """One container at a time, with storage of its own. `criu` is used when the machine has none."""

    def __init__(self, rootfs, criu):
        if not shutil.which("podman") or not shutil.which("runc"):
            raise NoPeer("podman and runc are not installed (scripts/setup.sh bench)")
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="stillbox-bench-podman-"))
        self.rootfs, self.name = rootfs, f"stillbox-bench-{os.getpid()}"
        self.environment = dict(os.environ)
        self.criu = "this machine's own CRIU"
        if not shutil.which("criu"):
            (self.folder / "bin").mkdir()
            (self.folder / "bin/criu").symlink_to(criu)
            self.environment["PATH"] = f"{self.folder}/bin:{self.environment['PATH']}"
            self.criu = "the CRIU that stillbox carries"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(self.command("rm", "--force", "--all"), env=self.environment, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *arguments):
        places = [f"--root={self.folder}/root", f"--runroot={self.folder}/run", "--storage-driver=vfs"]
        return ["podman", *places, "--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none", *arguments]

    def call(self, *arguments):
        done = subprocess.run(self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise NoPeer(f"`podman {' '.join(arguments[:2])}` says: {said}")
        return done.stdout

    def run(self):
        self.call("run", "--detach", f"--name={self.name}", "--network=none", *LIMITS, "--rootfs", f"{self.rootfs}:O", "sleep", "600")

    def first_answer(self):
        if self.call("exec", self.name, "/bin/echo", "on") != "on\n":
            raise NoPeer("a command in the container printed something else")

    def checkpoint(self):
        self.call("container", "checkpoint", self.name)

    def restore(self):
        self.call("container", "restore", self.name)

    def remove(self):
        self.call("rm", "--force", "--time=0", self.name)
