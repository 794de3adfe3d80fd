"""One server for the whole run; every test makes and ends its own sandboxes."""

import os
import socket

import pytest
from outside import outside
from server import Server

# Short, so that the tests of history and of waking need no long waits.
# Callbacks of HopX's tests go to a server on loopback.
SETTINGS = {
    "sandbox.running_max": "40",
    "novita.idle_timeout_min": "1 s",
    "novita.run_max": "600 s",
    "api.callback_allow": "127.0.0.0/8",
    # The registry that the tests of images start has no certificate.
    "template.plain_http_registries": "127.0.0.1",
}

_real_getaddrinfo = socket.getaddrinfo


def _resolve_localhost(host, *arguments, **options):
    """`*.localhost` is this machine (RFC 6761); glibc knows it only with nss-myhostname."""
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name.endswith(".localhost"):
        host = "127.0.0.1"
    return _real_getaddrinfo(host, *arguments, **options)


socket.getaddrinfo = _resolve_localhost


def pytest_addoption(parser):
    parser.addoption("--js", default=None, help="folder with node_modules/e2b")
    parser.addoption("--novita-js", action="append", default=[], help="folder with node_modules/novita-sandbox")
    parser.addoption("--s3", default=None, help="moto_server, for the tests that mount a bucket")


@pytest.fixture(scope="session", autouse=True)
def server():
    server = Server(templates=("base", "code-interpreter"), **SETTINGS)
    server.start()
    os.environ.update(server.environment())
    os.environ.update(server.environment("novita"))
    yield server
    server.remove()
    if server.process.returncode not in (0, None):
        pytest.fail(f"the server ended with {server.process.returncode}:\n{server.log()[-2000:]}")


@pytest.fixture
def sandbox(server):
    from e2b import Sandbox

    sandbox = Sandbox.create(timeout=120)
    yield sandbox
    sandbox.kill()


@pytest.fixture(scope="session")
def access(server):
    """What every call of HopX's SDK needs to reach the test's server."""
    return {"api_key": server.environment()["E2B_API_KEY"], "base_url": f"http://127.0.0.1:{server.port}"}


@pytest.fixture(scope="module")
def reaching():
    """A server of its own, whose sandboxes reach the machine of outside.py."""
    with outside() as settings:
        server = Server(**settings)
        server.start()
        yield server
        server.remove()
