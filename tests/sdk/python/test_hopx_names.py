"""HopX's SDKs as HopX's own page uses them (contract novita.md, A7 39-48): nothing configured but the key and
the CA, the API at https://api.hopx.dev. In a world of the test's own that name, and those of sandboxes, lead to the test's
server by its own name server and `stillbox hosts`.
"""

import pathlib
import sys

import pytest
from client import environment_with, lines_of
from server import Server
from world import NAME_SERVER, own_world

PYTHON = r'''
import asyncio, time, urllib.request
from hopx_ai import Sandbox
from hopx_ai.errors import HopxError, NotFoundError

sandbox = Sandbox.create(template="base", timeout_seconds=120, env_vars={"A": "1"})
print(sandbox.commands.run("echo $A").stdout, end="")
print(sandbox.get_info().public_host.replace(sandbox.sandbox_id, "ID"))

# Running: the token is refreshed. Paused: resumed, with its memory. Two clients share one sandbox.
same = Sandbox.connect(sandbox.sandbox_id)
same.files.write("/workspace/index.html", "by its preview")
same.commands.run("nohup python3 -m http.server 8000 >/dev/null 2>&1 &")
sandbox.pause()
print(sandbox.get_info().status)
same = Sandbox.connect(sandbox.sandbox_id)
print(same.get_info().status, sandbox.files.read("/workspace/index.html"))
for _ in range(100):
    try:
        print(urllib.request.urlopen(same.get_preview_url(8000)).read().decode())
        break
    except OSError:
        time.sleep(0.1)

async def stream():
    return "".join([message["data"] async for message in same.run_code_stream("print('streamed')") if message["type"] == "stdout"])

print(asyncio.run(stream()), end="")
print([other.sandbox_id == sandbox.sandbox_id for other in Sandbox.list(status="running")])
same.refresh_token()
print(same.run_code("print(6 * 7)").stdout, end="")
sandbox.kill()
try:
    Sandbox.connect(sandbox.sandbox_id)
except NotFoundError:
    print("not found")
'''

JAVASCRIPT = r'''
import { Sandbox } from '@hopx-ai/sdk'

const sandbox = await Sandbox.create({ template: 'base', timeoutSeconds: 120, envVars: { A: '1' } })
console.log((await sandbox.commands.run('echo $A')).stdout.trim())
await sandbox.files.write('/workspace/note', 'from JavaScript')
await sandbox.pause()
const same = await Sandbox.connect(sandbox.sandboxId)
console.log(await same.files.read('/workspace/note'))
for await (const message of same.runCodeStream('print("streamed")')) if (message.type === 'stdout') process.stdout.write(message.data)
await same.kill()
'''


@pytest.fixture
def cloud(tmp_path):
    """The environment of a program that knows the key and the CA, where api.hopx.dev is the test's server."""
    with own_world(tmp_path):
        server = Server(**{"dns.listen": f"{NAME_SERVER}:53", "dns.names": "api.hopx.dev,*.local.vms.hopx.dev"})
        server.tls_port = 443
        try:
            server.start()
            server.cli("hosts", "--install", "--resolver", "--sdk", "hopx")
            yield environment_with(server, "hopx", "HOPX_API_KEY", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
        finally:
            server.remove()


def test_both_sdks_work_with_nothing_but_the_key_and_the_ca(cloud, request):
    assert lines_of([sys.executable, "-c", PYTHON], cloud) == [
        "1",
        "https://7777-ID.local.vms.hopx.dev",
        "paused",
        "running by its preview",
        "by its preview",
        "streamed",
        "[True]",
        "42",
        "not found",
    ]
    if modules := request.config.getoption("--js"):
        script = pathlib.Path(modules) / "hopx_names.mjs"
        script.write_text(JAVASCRIPT)
        assert lines_of(["node", script], cloud, cwd=modules) == ["1", "from JavaScript", "streamed"]
