"""A machine outside of this one, as far as sandboxes can tell: a network namespace with an HTTPS server that answers
with the headers it was sent, and a name server that knows it. Nothing of it outlives the test but by a crash."""

import contextlib
import json
import pathlib
import secrets
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "api.outside.test"


class Echo(BaseHTTPRequestHandler):
    """Every request is answered with its path, headers and body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        said = {"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}, "body": self.rfile.read(length).decode()}
        answer = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def serve(address, certificate):
    """Runs inside the namespace until it is killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    encrypted = ThreadingHTTPServer((address, 443), Echo)
    encrypted.socket = context.wrap_socket(encrypted.socket, server_side=True)
    threading.Thread(target=encrypted.serve_forever, daemon=True).start()
    ThreadingHTTPServer((address, 80), Echo).serve_forever()


def answer_names(listener, address):
    """Everything at outside.test is at `address`; nothing else has one."""
    while True:
        question, asker = listener.recvfrom(512)
        end = question.index(b"\0", 12) + 5
        is_known, is_address = b"\x07outside\x04test\0" in question[:end], question[end - 4 : end] == b"\0\1\0\1"
        flags = b"\x81\x80" if is_known else b"\x81\x83"
        record = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 60, 4) + socket.inet_aton(address) if is_known and is_address else b""
        head = question[:2] + flags + b"\0\1" + struct.pack(">H", 1 if record else 0) + b"\0\0\0\0"
        listener.sendto(head + question[12:end] + record, asker)


@contextlib.contextmanager
def outside():
    """Gives the settings that a server needs to reach it."""
    unique = secrets.token_hex(3)
    netns, near, far = f"out-{unique}", f"oa{unique}", f"ob{unique}"
    block = f"10.{secrets.randbelow(50) + 200}.{secrets.randbelow(256)}"
    host, address = f"{block}.1", f"{block}.2"
    run = lambda *words: subprocess.run(words, check=True, capture_output=True)
    folder = tempfile.TemporaryDirectory(prefix="outside-")
    certificate = pathlib.Path(folder.name) / "server.pem"
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},DNS:other.outside.test", "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", str(certificate) + ".key", "-out", str(certificate),
    )  # fmt: skip
    both = pathlib.Path(folder.name) / "both.pem"
    both.write_text(certificate.read_text() + pathlib.Path(f"{certificate}.key").read_text())
    run("ip", "netns", "add", netns)
    server = None
    try:
        run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", netns)
        run("ip", "addr", "add", f"{host}/30", "dev", near)
        run("ip", "link", "set", near, "up")
        for words in (f"addr add {address}/30 dev {far}", f"link set {far} up", "link set lo up", f"route add default via {host}"):
            run("ip", "-n", netns, *words.split())
        server = subprocess.Popen(["ip", "netns", "exec", netns, sys.executable, __file__, address, str(both)])
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        resolver = f"127.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
        listener.bind((resolver, 53))
        threading.Thread(target=answer_names, args=(listener, address), daemon=True).start()
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((address, 80), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, "the outside does not come up"
                time.sleep(0.05)
        yield {"network.dns_upstreams": resolver, "network.allow_private": f"{address}/32", "network.extra_ca_file": str(certificate)}
    finally:
        if server is not None:
            server.kill()
            server.wait()
        subprocess.run(["ip", "netns", "delete", netns], check=False)
        subprocess.run(["ip", "link", "delete", near], check=False, capture_output=True)
        folder.cleanup()


if __name__ == "__main__":
    serve(*sys.argv[1:])
