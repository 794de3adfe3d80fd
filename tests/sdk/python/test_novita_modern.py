"""What only Novita's 2.x SDKs have, and both clouds' SDKs on one server and the same sandboxes."""

import time

import e2b
import pytest
from novita_common import api, count, start_counter, until
from novita_sandbox.core import Sandbox
from novita_sandbox.core.exceptions import SandboxNotFoundException


@pytest.fixture
def sandbox(server):
    sandbox = Sandbox.create(timeout=120)
    yield sandbox
    sandbox.kill()


def test_a_sandbox_made_with_one_sdk_is_used_with_the_other(sandbox):
    sandbox.files.write("a.txt", "novita")
    same = e2b.Sandbox.connect(sandbox.sandbox_id)
    assert same.files.read("a.txt") == "novita"
    same.commands.run("echo e2b > a.txt")
    same.pause()
    assert not sandbox.is_running()
    sandbox.connect()
    assert sandbox.files.read("a.txt") == "e2b\n" and same.is_running()
    other = e2b.Sandbox.create(timeout=60)
    assert Sandbox.connect(other.sandbox_id).commands.run("echo $((6*7))").stdout == "42\n"
    assert Sandbox.kill(other.sandbox_id) is True and not other.is_running()


def test_clone_results_have_their_count_and_their_template(sandbox):
    clones = Sandbox.clone(sandbox.sandbox_id, 2, strict=True)
    assert (len(clones), clones.count) == (2, 2) and clones.snapshot_template_id
    assert all(one.is_running() for one in clones)
    for one in clones:
        one.kill()
    assert Sandbox.delete_snapshot(clones.snapshot_template_id) is True
    assert Sandbox.delete_snapshot(clones.snapshot_template_id) is False


def test_the_quota_counts_what_runs(sandbox):
    before = Sandbox.get_quota()
    assert before.limit.concurrent_instances == 40 and before.limit.disk_mb > 19000
    other = Sandbox.create(timeout=60)
    after = Sandbox.get_quota()
    info = other.get_info()
    assert after.usage.concurrent_instances == before.usage.concurrent_instances + 1
    assert after.usage.concurrent_vcpu == before.usage.concurrent_vcpu + info.cpu_count
    assert after.usage.concurrent_ram_mb == before.usage.concurrent_ram_mb + info.memory_mb
    other.pause()
    assert Sandbox.get_quota().usage.concurrent_instances == before.usage.concurrent_instances
    other.kill()


OVERLAY = (
    "sudo sh -c 'mkdir /tmp/o && mount -t tmpfs tmpfs /tmp/o && cd /tmp/o && mkdir l u w m && "
    "mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w m'"
)


def test_events_tell_what_was_done_and_are_paged(server, sandbox):
    sandbox.pause()
    sandbox.connect()
    sandbox.set_timeout(100)
    sandbox.connect()
    ended = Sandbox.create(timeout=1)
    until(lambda: not ended.is_running(), "it ends by itself", 5)
    names = lambda **query: [item.event_name for item in Sandbox.get_events(sandbox_id=sandbox.sandbox_id, **query).items]
    assert names() == ["connect", "timeout", "resume", "pause", "create"]
    assert names(order_asc=True)[:2] == ["create", "pause"]
    assert names(events="pause,resume") == ["resume", "pause"]
    first = Sandbox.get_events(sandbox_id=sandbox.sandbox_id, limit=2)
    assert (first.total, first.has_more, len(first.items)) == (5, True, 2)
    last = Sandbox.get_events(sandbox_id=sandbox.sandbox_id, limit=2, offset=4)
    assert (last.has_more, [item.event_name for item in last.items]) == (False, ["create"])
    assert all(item.state == "success" and item.template_name == "base" for item in first.items)
    assert names(start_time=int(time.time()) + 60) == [] and names(state="failed") == []
    # The status is the one that was answered.
    sandbox.commands.run(OVERLAY)
    assert api(server, "POST", f"/sandboxes/{sandbox.sandbox_id}/pause", {})[0] == 422
    failed = Sandbox.get_events(sandbox_id=sandbox.sandbox_id, state="failed").items
    assert [(item.event_name, item.status_code, "/tmp/o/m" in item.error_msg) for item in failed] == [("pause", 422, True)]
    end = lambda: [item for item in Sandbox.get_events(sandbox_id=ended.sandbox_id, events="delete").items]
    assert until(end, "the end is told")[0].error_msg == "its time was up"


def test_the_lifecycle_is_an_option_too(server):
    sandbox = Sandbox.create(timeout=1, lifecycle={"on_timeout": "pause", "auto_resume": True})
    assert sandbox.get_info().lifecycle["auto_resume"] is True
    until(lambda: not any(row.sandbox_id == sandbox.sandbox_id and row.state.value == "running" for row in Sandbox.list().next_items()), "it is paused", 6)
    assert sandbox.commands.run("echo awake").stdout == "awake\n"
    sandbox.kill()


def test_snapshots_are_made_listed_started_and_deleted(sandbox):
    sandbox.files.write("a.txt", "stored")
    stored = sandbox.create_snapshot()
    assert [one.snapshot_id for one in sandbox.list_snapshots().next_items()] == [stored.snapshot_id]
    started = Sandbox.create(stored.snapshot_id, timeout=60)
    assert started.files.read("a.txt") == "stored"
    started.kill()
    assert Sandbox.delete_snapshot(stored.snapshot_id) is True


def test_public_traffic_can_be_closed_and_opened_by_connect(sandbox):
    """allowPublicTraffic: the token of the answer opens the port again."""
    from novita_common import get

    start_counter(sandbox)
    same = Sandbox.connect(sandbox.sandbox_id, allow_public_traffic=False)
    assert count(sandbox) is None
    assert int(get(f"https://{sandbox.get_host(8000)}/", {"e2b-traffic-access-token": same.traffic_access_token})) > 0
    Sandbox.connect(sandbox.sandbox_id, allow_public_traffic=True)
    assert until(lambda: count(sandbox), "the port is open again")


def test_rules_for_the_network_are_replaced(sandbox):
    sandbox.set_network(allow_out=["1.1.1.1"], deny_out=["0.0.0.0/0"])
    assert sandbox.get_info().network["deny_out"] == ["0.0.0.0/0"]
    sandbox.set_network()
    assert "deny_out" not in sandbox.get_info().network


def test_plain_http_serves_commands_and_files_without_any_domain(server, sandbox, monkeypatch):
    """A6, mode B: the API and the sandboxes below one URL, instances that connect told apart by their tokens."""
    monkeypatch.setenv("NOVITA_SANDBOX_URL", server.environment("novita")["NOVITA_API_URL"])
    monkeypatch.delenv("NOVITA_DOMAIN")
    other = Sandbox.create(timeout=60)
    other.files.write("a.txt", "by http")
    again = Sandbox.connect(other.sandbox_id)
    assert again.commands.run("cat a.txt").stdout == "by http" and again.files.read("a.txt") == "by http"
    [one] = Sandbox.clone(other.sandbox_id)
    assert one.commands.run("cat a.txt").stdout == "by http"
    assert one.kill() and other.kill() and not again.is_running()


def test_the_legacy_protocol_speaks_to_the_same_server(server, monkeypatch):
    """2.x speaks 1.x's protocol when its domain is one of the old ones: ids with a client, pause with a body."""
    monkeypatch.setenv("NOVITA_DOMAIN", "sandbox.novita.ai")
    old = Sandbox.create(timeout=60, secure=True)
    assert "-" in old.sandbox_id
    # The domain of the answer wins over the configured one, so the sandbox itself is found.
    assert old.commands.run("echo legacy").stdout == "legacy\n"
    assert Sandbox.pause(old.sandbox_id) and not old.is_running()
    again = Sandbox.connect(old.sandbox_id)
    assert again.sandbox_id == old.sandbox_id and old.is_running()
    until(lambda: Sandbox.get_metrics(old.sandbox_id), "metrics are in MiB")
    assert old.kill() is True


def test_memory_is_added_and_taken_back_while_it_runs(sandbox):
    fill = "python3 -c 'b = bytearray(1200 << 20); print(len(b) >> 20)'"
    before = sandbox.get_info().memory_mb
    assert before == 1024 and sandbox.commands.run(f"{fill} || echo killed").stdout == "killed\n"
    sandbox.hotplug_memory(512)
    assert sandbox.get_info().memory_mb == before + 512 and sandbox.commands.run(fill).stdout == "1200\n"
    sandbox.pause()
    sandbox.connect()
    assert sandbox.commands.run(fill).stdout == "1200\n"
    sandbox.hotplug_memory(0)
    assert sandbox.get_info().memory_mb == before


def test_what_is_not_served_says_so(sandbox):
    with pytest.raises(Exception, match="invalid mounts"):
        Sandbox.create(volume_mounts={"/mnt": "data"})
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect("i00000000000000000000")


def test_templates_come_in_numbered_pages(server):
    status, page = api(server, "GET", "/v2/templates?page=1&limit=1")
    assert status == 200 and page["page"] == 1 and page["totalPages"] == page["total"] >= 1 and len(page["templates"]) == 1
    assert api(server, "GET", "/v2/templates?page=0")[0] == 400
