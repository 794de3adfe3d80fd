"""Novita's SDKs with nothing configured but the key and the CA: the API under the domain that each version has built in.
In a world of the test's own that domain leads to the test's server by its own name server and `stillbox hosts`.
"""

import pathlib
import sys

from client import environment_with, lines_of
from novita_common import VERSION
from server import Server
from world import NAME_SERVER, own_world

# 2.x on the first of them speaks its own protocol, on the second 1.x's.
DOMAIN = "sandbox.novita.ai" if VERSION.startswith("1.") else "us-phx-1.sandbox.novita.ai"

PYTHON = r'''
import time, urllib.request
from novita_sandbox.core import Sandbox

sandbox = Sandbox.create(timeout=60, metadata={"names": "python"})
print(sandbox.commands.run("echo command").stdout, end="")
sandbox.files.write("/home/user/index.html", "served inside")
print(sandbox.files.read("/home/user/index.html"))
sandbox.commands.run("python3 -m http.server 3000", background=True, timeout=0)
host = sandbox.get_host(3000)
print(host.partition(".")[2])
for _ in range(100):
    try:
        print(urllib.request.urlopen(f"https://{host}/").read().decode())
        break
    except OSError:
        time.sleep(0.1)
(getattr(sandbox, "pause", None) or sandbox.beta_pause)()
print(sandbox.is_running())
again = Sandbox.connect(sandbox.sandbox_id)
print(again.commands.run("cat index.html").stdout)
print(len(Sandbox.list().next_items()), again.kill())
'''

JAVASCRIPT = r'''
import { Sandbox } from 'novita-sandbox'

const sandbox = await Sandbox.create({ timeoutMs: 60_000 })
console.log((await sandbox.commands.run('echo command')).stdout.trim())
await sandbox.files.write('a.txt', 'from JavaScript')
await (sandbox.pause ? sandbox.pause() : sandbox.betaPause())
const again = await Sandbox.connect(sandbox.sandboxId)
console.log(await again.files.read('a.txt'), await Sandbox.kill(again.sandboxId))
'''


def test_the_sdk_works_with_nothing_but_the_key_and_the_ca(tmp_path, request):
    with own_world(tmp_path):
        server = Server(domain=DOMAIN, **{"dns.listen": f"{NAME_SERVER}:53", "dns.names": "*.sandbox.novita.ai"})
        server.tls_port = 443
        try:
            server.start()
            server.cli("hosts", "--install", "--resolver", "--sdk", "novita")
            environment = environment_with(server, "novita", "NOVITA_API_KEY", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
            lines = lines_of([sys.executable, "-c", PYTHON], environment)
            assert lines == ["command", "served inside", DOMAIN, "served inside", "False", "served inside", "1 True"]
            for modules in map(pathlib.Path, request.config.getoption("--novita-js")):
                is_old = '"version": "1.' in (modules / "node_modules/novita-sandbox/package.json").read_text()
                if is_old != VERSION.startswith("1."):
                    continue  # its built-in domain is the other one
                (modules / "names.mjs").write_text(JAVASCRIPT)
                assert lines_of(["node", "names.mjs"], environment, cwd=modules) == ["command", "from JavaScript true"]
        finally:
            server.remove()
