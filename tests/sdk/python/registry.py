"""A registry on loopback, and images for it."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import time
import urllib.error
import urllib.request

from server import free_port

SMALL = "team/small:v1"


def tar_of(*entries):
    """A layer: (path, content or None for a folder or "-> target", mode)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content, mode in entries:
            info = tarfile.TarInfo(path)
            info.mode = mode
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str) and content.startswith("-> "):
                info.type, info.linkname = tarfile.SYMTYPE, content[3:]
            else:
                content = content.encode() if isinstance(content, str) else content
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def write_layout(folder, layers, name=SMALL):
    """An OCI layout with one image."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(content, kind):
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "GREETING=hello from the image"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(gzip.compress(layer, 1), "layer.v1.tar+gzip") for layer in layers],
    }
    described = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    described["annotations"] = {"org.opencontainers.image.ref.name": name}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


class Registry:
    """Debian's docker-registry on a port of its own, with the image of a layout in it."""

    def __init__(self, folder, layout, auth=None, credentials=(), name=SMALL):
        self.host = f"127.0.0.1:{free_port()}"
        settings = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}}, "http": {"addr": self.host}}
        if auth is not None:
            (folder / "htpasswd").write_text(auth)
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(json.dumps(settings))
        command = ["docker-registry", "serve", str(folder / "config.yml")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait()
        target = f"docker://{self.host}/{name}"
        source = f"oci:{layout}:{name}"
        subprocess.run(["skopeo", "copy", "-q", "--dest-tls-verify=false", *credentials, source, target], check=True)

    def wait(self):
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
                return
            except urllib.error.HTTPError:
                return  # it is there, and locked
            except urllib.error.URLError:
                assert time.monotonic() < deadline and self.process.poll() is None, "docker-registry does not answer"
                time.sleep(0.02)

    def stop(self):
        self.process.kill()
        self.process.wait()
