"""Novita's clones, resets and commits (contract novita.md, A2 and A7 32-35), with the SDKs that have them: 1.2 and 2.x."""

import pytest
from novita_common import api, bare, count, seconds_left, start_counter, until
from novita_sandbox.core import Sandbox, SandboxQuery, SandboxState


@pytest.fixture
def sandbox(server):
    sandbox = Sandbox.create(timeout=120)
    yield sandbox
    sandbox.kill()


def clone(sandbox, *arguments, **options):
    return list(Sandbox.clone(sandbox.sandbox_id, *arguments, **options))


def end(*sandboxes):
    for sandbox in sandboxes:
        sandbox.kill()


def test_a_counter_in_memory_is_cloned_and_the_clones_diverge(sandbox):
    """32, 33: the same files and memory; the parent runs on."""
    start_counter(sandbox)
    sandbox.files.write("a.txt", "parent")
    before = count(sandbox)
    one, other = clone(sandbox, 2)
    assert one.files.read("a.txt") == other.files.read("a.txt") == "parent"
    assert until(lambda: count(one), "the first clone serves") == before + 1
    assert [count(one), count(one)] == [before + 2, before + 3]
    assert until(lambda: count(other), "the second clone serves") == before + 1
    assert count(sandbox) == before + 1
    one.files.write("a.txt", "clone")
    assert sandbox.files.read("a.txt") == other.files.read("a.txt") == "parent"
    assert len({bare(made.sandbox_id) for made in (sandbox, one, other)}) == 3
    end(one, other)


def test_clones_of_a_running_parent_inherit_its_timeout(server):
    """34: the parent's, or what was asked for."""
    parent = Sandbox.create(timeout=90, metadata={"auto_resume": "true"})
    [one] = clone(parent)
    [other] = clone(parent, 1, timeout=45)
    assert abs(seconds_left(one) - 90) < 2 and abs(seconds_left(other) - 45) < 2
    assert seconds_left(parent) < 92
    end(one, other, parent)


def test_clones_of_a_paused_parent_run_and_it_stays_paused(sandbox):
    """34: five minutes; the counter of each goes on from the parent's."""
    start_counter(sandbox)
    before = count(sandbox)
    (getattr(sandbox, "pause", None) or sandbox.beta_pause)()
    one, other = clone(sandbox, 2, strict=True)
    assert abs(seconds_left(one) - 300) < 2
    assert until(lambda: count(one), "a clone serves") == before + 1 and until(lambda: count(other), "the other, too") == before + 1
    paused = Sandbox.list(query=SandboxQuery(state=[SandboxState.PAUSED])).next_items()
    assert bare(sandbox.sandbox_id) in [bare(row.sandbox_id) for row in paused]
    end(one, other)


def test_auto_resume_is_inherited_and_auto_pause_is_not(server):
    parent = Sandbox.create(timeout=60, auto_pause=True, metadata={"auto_resume": "true"})
    status, made = api(server, "POST", f"/sandboxes/{bare(parent.sandbox_id)}/clone", {"count": 1})
    assert status == 201
    lifecycle = api(server, "GET", f"/sandboxes/{made['sandboxes'][0]['sandboxID']}")[1]["lifecycle"]
    assert lifecycle == {"autoResume": True, "onTimeout": "kill"}
    api(server, "DELETE", f"/sandboxes/{made['sandboxes'][0]['sandboxID']}")
    parent.kill()


def test_a_strict_clone_that_cannot_be_whole_leaves_nothing(server, sandbox):
    """35, and the quota: 40 may run on the tests' server."""
    running = lambda: len(api(server, "GET", "/sandboxes")[1])
    before = running()
    with pytest.raises(Exception, match="running_max"):
        Sandbox.clone(sandbox.sandbox_id, 40, strict=True)
    assert running() == before
    for wrong in (0, -1, 41):
        with pytest.raises(Exception, match=f"count is {wrong}"):
            Sandbox.clone(sandbox.sandbox_id, wrong)
    assert running() == before
    sandbox.kill()
    with pytest.raises(Exception, match="not found"):
        Sandbox.clone(sandbox.sandbox_id, 1)


def test_what_clones_came_from_is_a_template_that_can_be_started_and_deleted(server, sandbox):
    start_counter(sandbox)
    before = count(sandbox)
    for pauses in (False, True):
        if pauses:
            (getattr(sandbox, "pause", None) or sandbox.beta_pause)()
        status, made = api(server, "POST", f"/sandboxes/{bare(sandbox.sandbox_id)}/clone", {"count": 1, "strict": True})
        assert status == 201
        template = made["snapshotTemplateId"]
        started = Sandbox.create(template, timeout=60)
        assert until(lambda: count(started), "what was started serves") > before
        end(started)
        api(server, "DELETE", f"/sandboxes/{made['sandboxes'][0]['sandboxID']}")
        assert api(server, "DELETE", f"/templates/{template}")[0] == 204
        assert api(server, "DELETE", f"/templates/{template}")[0] == 404


def test_a_reset_keeps_files_and_drops_memory(sandbox):
    start_counter(sandbox)
    sandbox.files.write("a.txt", "kept")
    assert sandbox.reset(resume=True, timeout=50) is True
    assert sandbox.is_running() and count(sandbox) is None
    assert sandbox.files.read("a.txt") == "kept"
    assert abs(seconds_left(sandbox) - 50) < 2
    # A paused one loses its memory as well, and stays paused when told so.
    start_counter(sandbox)
    (getattr(sandbox, "pause", None) or sandbox.beta_pause)()
    assert sandbox.reset(resume=False) is True
    assert not sandbox.is_running()
    sandbox.connect()
    assert sandbox.files.read("a.txt") == "kept" and count(sandbox) is None


def test_a_commit_is_a_template(server, sandbox):
    sandbox.files.write("a.txt", "committed")
    template = sandbox.commit(alias="committed")
    found = template.template_id
    started = Sandbox.create("committed", timeout=60)
    assert started.files.read("a.txt") == "committed"
    end(started)
    assert api(server, "DELETE", f"/templates/{found}")[0] == 204
