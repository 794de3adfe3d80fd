"""A real `stillbox serve` with a data folder and ports of its own, and the means to kill it and start it again."""

import atexit
import errno
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[3]
BINARY = os.environ.get("STILLBOX_BIN", str(ROOT / "target/release/stillbox"))
START_S_MAX = 240


# The server refuses variables that it does not know; the tests' own are none of its business.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STILLBOX_")}


# Below what the kernel takes by itself for connections and `bind(0)` (ip_local_port_range begins at 32768), so that
# nobody comes by one of these by accident, not even while its server is killed and started again.
PORTS = range(16000, 32000)
_held = []


def free_port():
    """A port of 127.0.0.1 and ::1 that no other test process is given as long as this one lives: several run side by
    side. The hold on it is an abstract socket's name, which goes with the process."""
    for port in random.sample(PORTS, len(PORTS)):
        hold = socket.socket(socket.AF_UNIX)
        if _binds(hold, f"\0stillbox-test-port-{port}") and _is_unused(port):
            _held.append(hold)
            return port
        hold.close()
    raise RuntimeError(f"every port of {PORTS} is in use")


def _is_unused(port):
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        return _binds(four, ("127.0.0.1", port)) and _binds(six, ("::1", port))


def _binds(probe, address):
    try:
        probe.bind(address)
    except OSError as error:
        # A machine without ::1 has nobody there either.
        return error.errno != errno.EADDRINUSE
    return True


class Server:
    """One server. `start` may be called again after `kill9` or `stop`: the data folder and the ports stay."""

    # Layers never change, so the servers of one run share those of a folder that no server uses: a served folder is a
    # mount of its own, and hard links do not cross mounts.
    template_dir = None

    def __init__(self, templates=("base",), **settings):
        self.templates = templates
        self.data_dir = pathlib.Path(tempfile.mkdtemp(prefix="stillbox-sdk-"))
        self.port, self.tls_port = free_port(), free_port()
        self.settings = settings
        self.process = None
        self.log_path = self.data_dir.with_suffix(".log")

    def command(self, *arguments):
        settings = [f"--set={key}={value}" for key, value in self.settings.items()]
        return [
            BINARY,
            f"--data-dir={self.data_dir}",
            f"--listen=localhost:{self.port}",
            f"--tls-listen=localhost:{self.tls_port}",
            *settings,
            *arguments,
        ]

    def start(self, **variables):
        """`variables` are added to the environment: only what has no setting, such as a failpoint."""
        self.take_layers()
        log = open(self.log_path, "ab")
        self.process = subprocess.Popen(self.command("serve"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT | variables)
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"the server did not answer within {START_S_MAX} s:\n{self.log()[-4000:]}")

    def take_layers(self):
        """Gives a new folder the base template by hard links; makes it once per run."""
        if (self.data_dir / "layers").exists():
            return
        if Server.template_dir is None and "STILLBOX_SDK_TEMPLATE" in os.environ:
            Server.template_dir = pathlib.Path(os.environ["STILLBOX_SDK_TEMPLATE"])
        if Server.template_dir is None:
            Server.template_dir = pathlib.Path(tempfile.mkdtemp(prefix="stillbox-sdk-template-"))
            atexit.register(shutil.rmtree, Server.template_dir, ignore_errors=True)
            archive = os.environ.get("STILLBOX_TEST_BASE")
            verbs = [["import", archive]] if archive else [["build", name] for name in self.templates]
            for verb in verbs:
                subprocess.run([BINARY, f"--data-dir={Server.template_dir}", "template", *verb], check=True, env=ENVIRONMENT)
        for folder in ("layers", "templates"):
            (self.data_dir / folder).mkdir(mode=0o700)
        layers = set()
        for manifest in (Server.template_dir / "templates").glob("*.json"):
            # `base-<hash>.json`
            if manifest.stem.rpartition("-")[0] in self.templates:
                shutil.copy(manifest, self.data_dir / "templates")
                layers.update(json.loads(manifest.read_text())["layers"])
        # A layer has tens of thousands of files: only what is asked for.
        for layer in layers:
            subprocess.run(["cp", "-al", str(Server.template_dir / "layers" / layer), str(self.data_dir / "layers")], check=True)

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_for_dump(self, name):
        """Until creates from the built-in template `name` are restores."""
        deadline = time.monotonic() + START_S_MAX
        made = set()
        while time.monotonic() < deadline:
            made = set(re.findall(r"Creates from build (\S+) restore", self.log()))
            if len(made) >= len(self.templates):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} has no dump; there are {made}:\n{self.log()[-2000:]}")

    def kill9(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)

    def cli(self, *arguments, check=True, **options):
        result = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)
        if check and result.returncode != 0:
            raise RuntimeError(f"stillbox {' '.join(arguments)} ended with {result.returncode}: {result.stderr}")
        return result

    def environment(self, sdk="e2b"):
        """What `stillbox env` prints for an SDK, as a dict."""
        lines = self.cli("env", "--sdk", sdk).stdout.splitlines()
        pairs = [shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in lines]
        return dict(pairs)

    def instance(self):
        return (self.data_dir / "instance-id").read_text().strip()

    def remove(self):
        """Ends the sandboxes, the server, and removes the data folder; what the kernel still holds is an error."""
        try:
            if self.process is not None and self.process.poll() is None:
                self.cli("sandbox", "kill", "--all", check=False)
            self.stop()
        finally:
            for line in reversed(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()):
                mount_point = line.split()[4]
                if mount_point.startswith(str(self.data_dir)):
                    subprocess.run(["umount", mount_point], check=False, stderr=subprocess.DEVNULL)
            remove_in_background(self.data_dir)

    def leftovers(self):
        """What the kernel and the disk hold under this instance's name, apart from the server's own."""
        instance = self.instance()
        found = []
        for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
            if str(self.data_dir / "sandboxes") in line:
                found.append("mount " + line.split()[4])
        images = {str(image.stat().st_ino): image for image in (self.data_dir / "sandboxes").glob("*/disk.img")}
        held = subprocess.run(["losetup", "--list", "--noheadings", "--output", "NAME,BACK-INO"], capture_output=True, text=True, check=True)
        for device, inode in (line.split() for line in held.stdout.splitlines() if len(line.split()) == 2):
            if inode in images:
                found.append(f"loop device {device} of {images[inode]}")
        for root, folders, _ in os.walk("/sys/fs/cgroup"):
            found += [f"cgroup {root}/{name}" for name in folders if instance in name and "/" not in name and is_sandbox(name)]
        for folder in (self.data_dir / "sandboxes").glob("*"):
            found.append(f"folder {folder}")
        return found


def remove_in_background(folder):
    """Tens of thousands of links: the next test need not wait for them, only the end of the run does."""
    atexit.register(subprocess.Popen(["rm", "-rf", folder]).wait)


def is_sandbox(name):
    """Whether a cgroup's name has a sandbox id in it: `i` and 20 letters or digits."""
    return any(len(word) == 21 and word[0] == "i" for word in name.replace(".", "-").replace("_", "-").split("-"))


if __name__ == "__main__":
    print(BINARY, file=sys.stderr)
