import asyncio
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request

import pytest
from e2b import Sandbox

ECHO_SERVER = r"""
import base64, hashlib, http.server, os, struct
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        if self.headers.get('Upgrade', '').lower() == 'websocket':
            return self.websocket()
        body = f'{self.path} {self.headers["Host"]}'.encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        self.send_response(200); self.send_header('Transfer-Encoding', 'chunked'); self.end_headers()
        left = int(self.headers['Content-Length'])
        while left:
            data = self.rfile.read(min(left, 65536)); left -= len(data)
            self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))
        self.wfile.write(b'0\r\n\r\n')
    def websocket(self):
        key = self.headers['Sec-WebSocket-Key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'
        self.send_response(101); self.send_header('Upgrade', 'websocket'); self.send_header('Connection', 'Upgrade')
        self.send_header('Sec-WebSocket-Accept', base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()); self.end_headers()
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8: return
            length = head[1] & 127
            if length == 126: length = struct.unpack('>H', self.rfile.read(2))[0]
            mask = self.rfile.read(4); data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            self.wfile.write(bytes([head[0], len(data)]) + data if len(data) < 126 else bytes([head[0], 126]) + struct.pack('>H', len(data)) + data)
http.server.ThreadingHTTPServer(('127.0.0.1', 8000), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def served(server):
    """A sandbox with an HTTP and WebSocket server that is bound to 127.0.0.1 inside."""
    with Sandbox.create(timeout=300) as sandbox:
        sandbox.files.write("echo.py", ECHO_SERVER)
        sandbox.commands.run("python3 echo.py", background=True, timeout=0)
        deadline = time.monotonic() + 10
        while "127.0.0.1:8000" not in sandbox.commands.run("ss -ltn").stdout and time.monotonic() < deadline:
            time.sleep(0.05)
        yield sandbox


def fetch(url, **options):
    context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    return urllib.request.urlopen(urllib.request.Request(url, **options), context=context, timeout=30)


def test_a_server_on_127_0_0_1_inside_is_reached_over_https(served):
    host = served.get_host(8000)
    with fetch(f"https://{host}/some/path?q=1") as answer:
        assert answer.read().decode() == f"/some/path?q=1 {host}"


def test_a_large_body_streams_through_and_back(served):
    blob = os.urandom(1 << 20) * 8
    with fetch(f"https://{served.get_host(8000)}/", data=blob, method="POST") as answer:
        assert answer.read() == blob


def test_a_websocket_goes_through(served):
    websockets = pytest.importorskip("websockets", reason="the runner installs it")

    async def talk():
        context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
        async with websockets.connect(f"wss://{served.get_host(8000)}/", ssl=context, proxy=None) as socket_:
            for text in ("hello", "x" * 5000):
                await socket_.send(text)
                assert await socket_.recv() == text

    asyncio.run(talk())


def test_a_closed_port_and_an_unknown_sandbox_are_told_apart(served, server):
    for host, text in ((served.get_host(9999), "port is not open"), (f"8000-i{'0' * 20}.stillbox.localhost:{server.tls_port}", "was not found")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(f"https://{host}/")
        body = json.loads(refused.value.read())
        assert refused.value.code == 502 and body["code"] == 502 and text in body["message"], body


def test_the_agents_internal_routes_are_not_served(served, server):
    for path in ("/init", "/freeze", "/stillbox/logs", "//init", "/%69nit"):
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method="POST", data=b"{}")
        request.add_header("E2b-Sandbox-Id", served.sandbox_id)
        request.add_header("E2b-Sandbox-Port", "49983")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 404, path


def test_another_sandboxes_token_opens_nothing(served):
    with Sandbox.create() as other:
        request = urllib.request.Request(f"{os.environ['E2B_SANDBOX_URL']}/process.Process/List", method="POST", data=b"{}")
        for name, value in {
            "E2b-Sandbox-Id": served.sandbox_id,
            "E2b-Sandbox-Port": "49983",
            "Content-Type": "application/json",
            "X-Access-Token": token_of(other),
        }.items():
            request.add_header(name, value)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 401


def token_of(sandbox):
    request = urllib.request.Request(f"{os.environ['E2B_API_URL']}/sandboxes/{sandbox.sandbox_id}")
    request.add_header("X-API-KEY", os.environ["E2B_API_KEY"])
    return json.load(urllib.request.urlopen(request))["envdAccessToken"]


def test_connections_are_cut_when_the_sandbox_is_killed(server):
    sandbox = Sandbox.create()
    sandbox.commands.run("python3 -m http.server 8000", background=True, timeout=0)
    deadline = time.monotonic() + 10
    while ":8000" not in sandbox.commands.run("ss -ltn").stdout and time.monotonic() < deadline:
        time.sleep(0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"POST / HTTP/1.1\r\nHost: 8000-{sandbox.sandbox_id}.stillbox.localhost\r\nContent-Length: 10\r\n\r\n".encode())
        time.sleep(0.2)
        sandbox.kill()
        client.settimeout(5)
        rest = b""
        try:
            while chunk := client.recv(4096):
                rest += chunk
        except ConnectionResetError:
            pass
    assert b"200 OK" not in rest


def test_no_internet_means_no_connection_leaves(server):
    with Sandbox.create(allow_internet_access=False) as sandbox:
        shown = sandbox.commands.run("curl -sS -m 3 http://1.1.1.1/ 2>&1; echo code $?").stdout
        assert "code 0" not in shown


def test_the_hosts_own_services_are_out_of_reach(server, sandbox):
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        gateway = sandbox.commands.run("ip route | awk '/default/ {print $3}'").stdout.strip()
        addresses = [gateway] if gateway else []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                addresses.append(probe.getsockname()[0])
            except OSError:
                pass  # a machine without any route
        for address in addresses:
            shown = sandbox.commands.run(f"curl -sS -m 2 http://{address}:{port}/ 2>&1; echo code $?").stdout
            assert "code 0" not in shown and "code 52" not in shown, (address, shown)
