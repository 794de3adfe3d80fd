"""What Novita's guide promises (contract novita.md, A7), with its unmodified SDK: every version, 1.x and 2.x.

The number in a test's first line is that of the statement in A7.
"""

import time
import urllib.error

import pytest
from novita_common import VERSION, api, bare, count, get, seconds_left, start_counter, until
from novita_sandbox.core import CommandExitException, Sandbox, SandboxQuery, SandboxState


@pytest.fixture
def sandbox(server):
    sandbox = Sandbox.create(timeout=120)
    yield sandbox
    sandbox.kill()


def pause(sandbox):
    (getattr(sandbox, "pause", None) or sandbox.beta_pause)()


def create_auto_pausing(**options):
    """1.0 knows auto-pause only as a beta."""
    return Sandbox.beta_create(auto_pause=True, **options) if VERSION.startswith("1.0.") else Sandbox.create(auto_pause=True, **options)


def listed(**query):
    paginator = Sandbox.list(query=SandboxQuery(**query)) if query else Sandbox.list()
    found = []
    while paginator.has_next:
        found += paginator.next_items()
    return found


def test_a_sandbox_lives_five_minutes_or_as_long_as_was_asked_for(server):
    """1, 2, 3: the default, the option, and set_timeout from now on in both directions."""
    sandbox = Sandbox.create()
    assert abs(seconds_left(sandbox) - 300) < 2
    for wanted in (30, 200):
        before = time.time()
        sandbox.set_timeout(wanted)
        assert abs(sandbox.get_info().end_at.timestamp() - before - wanted) < 3
    sandbox.kill()
    sandbox = Sandbox.create(timeout=60)
    assert abs(seconds_left(sandbox) - 60) < 2
    sandbox.kill()


def test_a_sandbox_ends_when_its_time_is_up(server):
    """4: shut down after the timeout; 6: kill tells whether there was something to kill."""
    sandbox = Sandbox.create(timeout=1)
    until(lambda: not sandbox.is_running(), "the sandbox is shut down", 5)
    assert sandbox.kill() is False
    sandbox = Sandbox.create(timeout=60)
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    assert not sandbox.is_running()


def test_info_says_what_was_asked_for(server):
    """5, 17: id, template and its name, metadata, version, times."""
    sandbox = Sandbox.create("base", metadata={"user": "42", "sp ace/é": "a&b=c"}, timeout=60)
    info = sandbox.get_info()
    assert bare(info.sandbox_id) == bare(sandbox.sandbox_id)
    assert (info.name, info.metadata) == ("base", {"user": "42", "sp ace/é": "a&b=c"})
    assert info.template_id and info.envd_version and info.started_at < info.end_at
    [row] = listed(metadata={"user": "42", "sp ace/é": "a&b=c"})
    assert row.metadata == info.metadata
    sandbox.kill()


def test_a_pause_keeps_files_and_memory_and_services_come_back(sandbox):
    """7, 8, 10, 14: the counter in memory goes on; the service is gone meanwhile; connect resumes, quickly."""
    start_counter(sandbox)
    sandbox.files.write("kept.txt", "kept")
    before = count(sandbox)
    pause(sandbox)
    assert not sandbox.is_running() and count(sandbox) is None
    begun = time.monotonic()
    same = Sandbox.connect(sandbox.sandbox_id)
    assert time.monotonic() - begun < 1
    assert bare(same.sandbox_id) == bare(sandbox.sandbox_id)
    assert until(lambda: count(same), "the service is back") == before + 1
    assert same.files.read("kept.txt") == "kept"
    pause(same)
    same.connect()
    assert same.is_running() and count(same) == before + 2


def test_a_resumed_sandbox_lives_five_minutes_or_as_long_as_was_asked_for(sandbox):
    """11."""
    pause(sandbox)
    Sandbox.connect(sandbox.sandbox_id)
    assert abs(seconds_left(sandbox) - 300) < 2
    pause(sandbox)
    Sandbox.connect(sandbox.sandbox_id, timeout=40)
    assert abs(seconds_left(sandbox) - 40) < 2


def test_pausing_what_is_paused_is_no_error_and_what_is_gone_is_one(sandbox):
    pause(sandbox)
    pause(sandbox)
    sandbox.kill()
    with pytest.raises(Exception, match="not found"):
        pause(sandbox)
    with pytest.raises(Exception, match="not found"):
        Sandbox.connect(sandbox.sandbox_id)


def test_lists_show_states_and_filter_on_the_server(server):
    """12, 13, 18, 19: paused ones, all pairs must match, both states by default; kill a paused one."""
    one = Sandbox.create(timeout=60, metadata={"list": "states", "n": "1"})
    other = Sandbox.create(timeout=60, metadata={"list": "states", "n": "2"})
    pause(other)
    ids = lambda **query: [bare(row.sandbox_id) for row in listed(metadata={"list": "states"}, **query)]
    assert ids(state=[SandboxState.PAUSED]) == [bare(other.sandbox_id)]
    assert ids(state=[SandboxState.RUNNING]) == [bare(one.sandbox_id)]
    assert sorted(ids()) == sorted(ids(state=[SandboxState.RUNNING, SandboxState.PAUSED])) == sorted([bare(one.sandbox_id), bare(other.sandbox_id)])
    assert [bare(row.sandbox_id) for row in listed(metadata={"list": "states", "n": "2"})] == [bare(other.sandbox_id)]
    assert listed(metadata={"list": "states", "n": "3"}) == []
    assert other.kill() is True and ids(state=[SandboxState.PAUSED]) == []
    one.kill()


def test_a_list_is_paged_and_a_new_sandbox_comes_first(server):
    """20, 21, 23: pages with a token; the newest is the first; it is connected to by its id and used."""
    made = [Sandbox.create(timeout=60, metadata={"list": "pages"}, envs={"N": str(n)}) for n in range(3)]
    paginator = Sandbox.list(query=SandboxQuery(metadata={"list": "pages"}), limit=2)
    assert paginator.has_next
    first = paginator.next_items()
    assert [bare(row.sandbox_id) for row in first] == [bare(made[2].sandbox_id), bare(made[1].sandbox_id)]
    assert paginator.has_next and paginator.next_token
    assert [bare(row.sandbox_id) for row in paginator.next_items()] == [bare(made[0].sandbox_id)]
    assert not paginator.has_next
    again = Sandbox.connect(first[0].sandbox_id)
    assert again.commands.run("echo $N").stdout == "2\n"
    for sandbox in made:
        sandbox.kill()


def test_pages_of_a_thousand_are_taken_and_larger_ones_are_cut(server):
    """20: two pages of the guide disagree about the largest page."""
    assert api(server, "GET", "/v2/sandboxes?limit=1000")[0] == 200
    assert api(server, "GET", "/v2/sandboxes?limit=5000")[0] == 200
    assert api(server, "GET", "/v2/sandboxes?limit=0")[0] == 400


def test_variables_are_the_sandboxs_and_a_commands_own_come_first(server):
    """22."""
    sandbox = Sandbox.create(timeout=60, envs={"A": "sandbox", "B": "sandbox"})
    assert sandbox.commands.run("echo $A $B", envs={"B": "command"}).stdout == "sandbox command\n"
    assert sandbox.commands.run("echo $A $B").stdout == "sandbox sandbox\n"
    sandbox.kill()


def test_metrics_come_every_two_seconds(sandbox):
    """15: at the start, then every 2 s; for ranges in the unit that this version sends."""
    import datetime

    first = until(lambda: sandbox.get_metrics(), "there is a first point")
    assert first[0].cpu_count > 0 and first[0].mem_total > 0 and first[0].mem_used > 0
    points = until(lambda: (points := sandbox.get_metrics()) if len(points := sandbox.get_metrics()) >= 4 else None, "there are four points", 12)
    steps = [(b.timestamp - a.timestamp).total_seconds() for a, b in zip(points[-3:], points[-2:])]
    assert all(abs(step - 2) <= 0.2 for step in steps), steps
    now = datetime.datetime.now(datetime.timezone.utc)
    hour = datetime.timedelta(hours=1)
    assert sandbox.get_metrics(start=now - hour, end=now + hour)
    assert not sandbox.get_metrics(start=now - 2 * hour, end=now - hour)


def test_a_port_has_a_public_url_over_https(sandbox):
    """25, 26 from outside: a server in the background is fetched by its URL, and gone after its kill."""
    sandbox.files.write("/home/user/www/index.html", "hello from inside")
    handle = sandbox.commands.run("python3 -m http.server 3000 --directory /home/user/www", background=True, timeout=0)
    url = f"https://{sandbox.get_host(3000)}"
    assert until(lambda: fetched(url), "the server answers") == "hello from inside"
    assert handle.kill()
    until(lambda: fetched(url) is None, "the server is gone")


def fetched(url):
    try:
        return get(url)
    except (OSError, urllib.error.URLError):
        return None


def test_the_disk_has_twenty_gigabytes(sandbox):
    """27."""
    size = int(sandbox.commands.run("df -B1 --output=size / | tail -1").stdout)
    assert 19e9 < size < 22e9


def test_commands_and_files_work_as_in_the_guide(sandbox):
    """The default user, exit codes, background output, upload and download."""
    assert sandbox.commands.run("whoami").stdout == "user\n"
    assert sandbox.commands.run("whoami", user="root").stdout == "root\n"
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo no >&2; exit 3")
    assert (failed.value.exit_code, failed.value.stderr) == (3, "no\n")
    seen = []
    sandbox.commands.run("for i in 1 2 3; do echo $i; done", on_stdout=seen.append)
    assert "".join(seen) == "1\n2\n3\n"
    written = sandbox.files.write("dir/a b.txt", "text")
    assert (written.name, written.type if isinstance(written.type, str) else written.type.value, written.path) == ("a b.txt", "file", "/home/user/dir/a b.txt")
    sandbox.files.write("dir/bytes", bytes(range(256)))
    assert bytes(sandbox.files.read("dir/bytes", format="bytes")) == bytes(range(256))
    assert sorted(entry.name for entry in sandbox.files.list("dir")) == ["a b.txt", "bytes"]
    assert sandbox.files.make_dir("made") is True and sandbox.files.make_dir("made") is False
    assert sandbox.files.exists("dir/bytes")
    sandbox.files.remove("dir/bytes")
    assert not sandbox.files.exists("dir/bytes")


def test_auto_pause_pauses_at_the_end_and_again_after_each_resume(server):
    """30."""
    sandbox = create_auto_pausing(timeout=1)
    for _ in range(2):
        until(lambda: listed_state(sandbox) == SandboxState.PAUSED, "it is paused at its end", 8)
        sandbox = Sandbox.connect(sandbox.sandbox_id, timeout=1)
        assert sandbox.is_running()
    sandbox.kill()


def listed_state(sandbox):
    return next((row.state for row in listed() if bare(row.sandbox_id) == bare(sandbox.sandbox_id)), None)


def test_auto_resume_lets_a_command_a_file_and_a_request_wake_it(server):
    """31: then it lives five minutes; set_timeout works."""
    sandbox = Sandbox.create(timeout=60, metadata={"auto_resume": "true"})
    pause(sandbox)
    assert sandbox.commands.run("echo awake").stdout == "awake\n"
    assert abs(seconds_left(sandbox) - 300) < 2
    sandbox.set_timeout(100)
    pause(sandbox)
    sandbox.files.write("a.txt", "awake")
    start_counter(sandbox)
    pause(sandbox)
    assert count(sandbox) is not None
    sandbox.kill()


def test_without_auto_resume_nothing_wakes_it(sandbox):
    pause(sandbox)
    with pytest.raises(Exception):
        sandbox.commands.run("echo awake")
    assert listed_state(sandbox) == SandboxState.PAUSED


def test_an_idle_sandbox_is_killed_within_two_seconds_of_its_idle_timeout(server):
    """36; looking at it is no use of it, a command that runs is."""
    sandbox = Sandbox.create(timeout=300, metadata={"idle_timeout": "2"})
    sandbox.commands.run("sleep 3")
    ended = time.monotonic()
    assert sandbox.is_running()
    until(lambda: not sandbox.is_running(), "it is killed", 8)
    # Two seconds of idleness were asked for: it ends within two more.
    assert 1.5 < time.monotonic() - ended <= 4.0


def test_an_idle_sandbox_with_auto_pause_is_paused(server):
    sandbox = create_auto_pausing(timeout=300, metadata={"idle_timeout": "1"})
    until(lambda: listed_state(sandbox) == SandboxState.PAUSED, "it is paused", 5)
    sandbox.kill()


def test_no_run_is_longer_than_the_maximum(server):
    """37; the tests' server has a maximum of 600 s, the default is 3600 s."""
    sandbox = Sandbox.create(timeout=300, metadata={"idle_timeout": "60"})
    assert abs(seconds_left(sandbox) - 600) < 2
    sandbox.set_timeout(600)
    assert seconds_left(sandbox) <= 600
    sandbox.kill()
    for wrong in ({"timeout": 601}, {"metadata": {"idle_timeout": "0.5"}}, {"metadata": {"idle_timeout": "soon"}}):
        with pytest.raises(Exception, match="novita.run_max" if "timeout" in wrong else "idle_timeout"):
            Sandbox.create(**wrong)
    sandbox = Sandbox.create(metadata={"long_running": "true"})
    assert seconds_left(sandbox) > 3600
    sandbox.kill()


def test_an_e2b_clients_metadata_stays_free_text(server):
    """The words of the lifecycle mean something to Novita's clients alone."""
    body = {"templateID": "base", "timeout": 60, "metadata": {"idle_timeout": "soon", "auto_resume": "true", "long_running": "x"}}
    status, made = api(server, "POST", "/sandboxes", body, agent="e2b-python-sdk/2.63.0")
    assert status == 201
    detail = api(server, "GET", f"/sandboxes/{made['sandboxID']}")[1]
    assert detail["metadata"] == body["metadata"] and detail["lifecycle"]["autoResume"] is False
    api(server, "DELETE", f"/sandboxes/{made['sandboxID']}")


def test_ids_with_and_without_the_client_mean_the_same_sandbox(server, sandbox):
    """A2: in paths and in host labels."""
    for name in (bare(sandbox.sandbox_id), bare(sandbox.sandbox_id) + "-6532622b"):
        assert api(server, "GET", f"/sandboxes/{name}")[1]["sandboxID"] == bare(sandbox.sandbox_id)
        assert Sandbox.connect(name).commands.run("echo same").stdout == "same\n"


def test_an_unknown_key_is_refused(server):
    with pytest.raises(Exception, match="401"):
        Sandbox.create(api_key="nobody")
