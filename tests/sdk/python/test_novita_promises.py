"""Two of the guide's promises that need a world or a clock of their own (contract novita.md, A7 9 and 24)."""

import datetime
import sqlite3

import pytest
from novita_common import COUNTER, bare, until
from novita_sandbox.core import Sandbox
from server import Server
from world import HOST, own_world


def access(server):
    """What the SDK needs to reach a server other than the session's."""
    known = server.environment("novita")
    return {"api_key": known["NOVITA_API_KEY"], "api_url": known["NOVITA_API_URL"], "sandbox_url": known["NOVITA_API_URL"]}


def count(sandbox):
    """The next number of the counter that runs inside, or nothing."""
    return sandbox.commands.run("curl -s localhost:8000 || true").stdout


def paused_earlier(server, sandbox, ago):
    """As if the pause had been that much earlier; the server must be stopped."""
    with sqlite3.connect(server.data_dir / "stillbox.db") as store:
        moved = store.execute("UPDATE sandboxes SET end_at = end_at - ? WHERE id = ?", (ago // datetime.timedelta(microseconds=1), bare(sandbox.sandbox_id)))
        assert moved.rowcount == 1


def test_a_paused_sandbox_is_usable_for_thirty_days_and_then_not_found():
    """9; with the default of `sandbox.paused_kept`."""
    server = Server()
    try:
        server.start()
        known = access(server)
        kept, lost = (Sandbox.create(timeout=60, **known) for _ in range(2))
        kept.files.write("/home/user/counter.py", COUNTER)
        kept.commands.run("python3 /home/user/counter.py", background=True, timeout=0)
        assert until(lambda: count(kept), "the counter answers") == "1"
        kept.pause()
        lost.pause()
        server.stop()
        paused_earlier(server, kept, datetime.timedelta(days=29, hours=23))
        paused_earlier(server, lost, datetime.timedelta(days=30, seconds=1))
        server.start()
        server.cli("gc")
        with pytest.raises(Exception, match="not found"):
            Sandbox.connect(lost.sandbox_id, **known)
        again = Sandbox.connect(kept.sandbox_id, **known)
        assert count(again) == "2"
        again.kill()
    finally:
        server.remove()


def test_a_sandbox_reaches_the_internet_by_name_and_by_address(tmp_path):
    """24: through NAT, with names from the host's resolver."""
    with own_world(tmp_path):
        server = Server()
        try:
            server.start()
            sandbox = Sandbox.create(timeout=60, **access(server))
            fetched = lambda url: sandbox.commands.run(f"curl -sS --max-time 10 {url}").stdout
            assert fetched("http://www.internet.example/page") == f"www.internet.example /page for {HOST}\n"
            assert fetched("http://93.184.216.34/page") == f"93.184.216.34 /page for {HOST}\n"
            unknown = sandbox.commands.run("curl -sS http://nobody.internet.example/ || true").stderr
            assert "Could not resolve host" in unknown, unknown
            sandbox.kill()
        finally:
            server.remove()
