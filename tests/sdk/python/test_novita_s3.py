"""A bucket mounted as Novita's guide does it, with Debian's own s3fs, in a template made as the guide makes one: FROM ubuntu
and apt-get (contract novita.md, A7 28 and 29). No public registry is reached: the name `ubuntu` leads to one on loopback.

Takes a minute or more, most of it the image's and apt's; the runner names the S3 server (moto) when it wants these, by --s3.
"""

import json
import subprocess
import urllib.parse
import urllib.request

import pytest
from internet import SPARE, SPARE_NAME
from novita_common import until
from novita_sandbox.core import Sandbox, Template
from registry import Registry, write_layout
from server import ENVIRONMENT, Server
from world import own_world

pytestmark = pytest.mark.skipif("not config.getoption('--s3')", reason="the runner names an S3 server by --s3")

UBUNTU = "library/ubuntu:latest"
BUCKET, PLACE = "guide", "/mnt/bucket"


def mirrors():
    """The hosts that apt on this machine, and so in its templates, takes packages from."""
    sites = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"], capture_output=True, text=True, check=True)
    return {urllib.parse.urlsplit(site).hostname for site in sites.stdout.split()}


# Half of the layer, and nothing that apt or s3fs need.
LEFT_OUT = ("usr/share/nodejs", "usr/lib/*/libnode.so*", "usr/lib/git-core", "usr/lib/python3*")


def ubuntu(folder, server):
    """A registry whose `ubuntu` is the layer of the base template: apt and no more is asked of it."""
    [manifest] = (server.data_dir / "templates").glob("base-*.json")
    [layer] = json.loads(manifest.read_text())["layers"]
    root = server.data_dir / "layers" / layer
    without = [f"--exclude=./{path}" for path in LEFT_OUT]
    archive = subprocess.run(["tar", "--create", "--numeric-owner", *without, "--directory", root, "."], capture_output=True, check=True).stdout
    write_layout(folder / "layout", [archive], UBUNTU)
    return Registry(folder, folder / "layout", name=UBUNTU)


@pytest.fixture(scope="module")
def world(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("world")
    with own_world(folder, real_hosts=mirrors()) as internet:
        environment = {**ENVIRONMENT, "S3_IGNORE_SUBDOMAIN_BUCKETNAME": "true"}
        command = ["nsenter", "--target", str(internet.pid), "--net", request.config.getoption("--s3"), "-H", SPARE, "-p", "80"]
        moto = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = Server()
        server.take_layers()
        registry = ubuntu(folder, server)
        server.settings = {"template.image_aliases": f"ubuntu={registry.host}/{UBUNTU}", "template.plain_http_registries": "127.0.0.1"}
        try:
            until(bucket_is_made, "the S3 server answers")
            yield server.start()
        finally:
            server.remove()
            registry.stop()
            moto.kill()
            moto.wait()


def bucket_is_made():
    try:
        request = urllib.request.Request(f"http://{SPARE}/{BUCKET}", method="PUT", data=b"")
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


def stored(key):
    """An object as the S3 server has it. It looks whether a request is signed, and not by whom."""
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=KEY_ID/20260101/us-east-1/s3/aws4_request"}
    with urllib.request.urlopen(urllib.request.Request(f"http://{SPARE}/{BUCKET}/{key}", headers=signed), timeout=10) as answer:
        return answer.read()


def access(server):
    known = server.environment("novita")
    return {"api_key": known["NOVITA_API_KEY"], "api_url": known["NOVITA_API_URL"], "sandbox_url": known["NOVITA_API_URL"]}


@pytest.fixture(scope="module")
def template(world):
    """29."""
    lines = []
    recipe = Template().from_dockerfile("FROM ubuntu:latest\nRUN apt-get update && apt-get install -y s3fs\n")
    Template.build(recipe, "with-s3fs", on_build_logs=lambda entry: lines.append(str(entry)), **access(world))
    assert any("Setting up s3fs" in line for line in lines), lines
    return "with-s3fs"


def mounted(server, template):
    """28, up to the mount."""
    sandbox = Sandbox.create(template, timeout=120, **access(server))
    sandbox.files.make_dir(PLACE)
    sandbox.files.write("/root/.passwd-s3fs", "KEY_ID:SECRET")
    sandbox.commands.run("sudo chmod 600 /root/.passwd-s3fs")
    sandbox.commands.run(f"sudo s3fs {BUCKET} {PLACE} -o url=http://{SPARE_NAME} -o use_path_request_style -o allow_other")
    return sandbox


def test_an_image_called_ubuntu_and_apt_get_make_a_template(world, template):
    """29."""
    sandbox = Sandbox.create(template, timeout=60, **access(world))
    version = sandbox.commands.run("s3fs --version").stdout
    assert tuple(map(int, version.split(" V")[1].split()[0].split("."))) >= (1, 93), version
    sandbox.kill()


def test_a_bucket_is_mounted_written_and_read(world, template):
    """28."""
    sandbox = mounted(world, template)
    sandbox.commands.run(f"echo from a sandbox > {PLACE}/note.txt && mkdir {PLACE}/folder && cp /etc/hostname {PLACE}/folder/name")
    sandbox.files.write(f"{PLACE}/by-the-api.bin", bytes(range(256)) * 4096)
    assert stored("note.txt") == b"from a sandbox\n"
    other = mounted(world, template)
    assert other.commands.run(f"cat {PLACE}/note.txt").stdout == "from a sandbox\n"
    assert bytes(other.files.read(f"{PLACE}/by-the-api.bin", format="bytes")) == bytes(range(256)) * 4096
    assert {entry.name for entry in other.files.list(PLACE)} == {"note.txt", "folder", "by-the-api.bin"}
    other.kill()
    sandbox.kill()


def test_a_pause_names_the_bucket_and_the_remedy(world, template):
    sandbox = mounted(world, template)
    with pytest.raises(Exception, match=f"422: .*fuse.s3fs mounted on {PLACE}; unmount it first"):
        sandbox.pause()
    assert sandbox.is_running() and sandbox.commands.run(f"ls {PLACE}").exit_code == 0
    sandbox.commands.run(f"sudo umount {PLACE}")
    until(lambda: sandbox.commands.run("pgrep -x s3fs || true").stdout == "", "s3fs is gone")
    sandbox.pause()
    assert not sandbox.is_running()
    sandbox.kill()


def test_a_pause_unmounts_the_bucket_where_the_configuration_says_so(world, template):
    world.stop()
    world.settings["pause.unmount_fuse"] = "true"
    world.start()
    sandbox = mounted(world, template)
    sandbox.commands.run(f"echo kept > {PLACE}/kept.txt")
    sandbox.pause()
    assert not sandbox.is_running()
    sandbox.connect(timeout=60)
    assert "fuse" not in sandbox.commands.run("cat /proc/mounts").stdout
    sandbox.commands.run(f"sudo s3fs {BUCKET} {PLACE} -o url=http://{SPARE_NAME} -o use_path_request_style -o allow_other")
    assert sandbox.commands.run(f"cat {PLACE}/kept.txt").stdout == "kept\n"
    sandbox.kill()
