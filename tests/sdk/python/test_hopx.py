"""HopX's unmodified Python SDK on the same server, and one sandbox seen with its SDK and with E2B's.

The number in a test's first line is that of the statement of HopX's connecting page in contract novita.md, A7.
"""

import asyncio
import datetime
import hmac
import http.server
import json
import threading
import time
import urllib.error
import urllib.request

import pytest
from hopx_ai import AsyncSandbox, Sandbox
from hopx_ai._token_cache import _token_cache
from hopx_ai.errors import (
    AgentError,
    AuthenticationError,
    DesktopNotAvailableError,
    FileNotFoundError,
    FileOperationError,
    HopxError,
    NotFoundError,
    TemplateNotFoundError,
    ValidationError,
)
from hopx_ai.template import BuildOptions, Template
from hopx_ai.template.types import ReadyCheck, ReadyCheckType


@pytest.fixture(scope="module")
def shared(access):
    """One sandbox for tests that leave it as they found it."""
    with Sandbox.create(template="base", timeout_seconds=300, env_vars={"GREETING": "hello"}, **access) as sandbox:
        yield sandbox


def call(access, method, path, body=None, token=None):
    request = urllib.request.Request(access["base_url"] + path, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    else:
        request.add_header("X-API-Key", access["api_key"])
    if body is not None:
        request.add_header("Content-Type", "application/json")
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request, data=data, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# ---------------------------------------------------------------- control plane


def test_a_sandbox_lives_from_create_to_kill(access):
    """43, 44: what the information says; an id that is gone."""
    sandbox = Sandbox.create(template="base", timeout_seconds=120, **access)
    info = sandbox.get_info()
    assert (info.status, info.template_name, info.public_host) == ("running", "base", access["base_url"])
    assert info.resources.vcpu == 2 and info.timeout_seconds == 120 and 100 < sandbox.get_time_to_expiry() <= 120
    result = sandbox.commands.run("id -un; pwd; echo err >&2; exit 3")
    assert (result.stdout.split(), result.stderr, result.exit_code) == (["user", "/workspace"], "err\n", 3)
    assert any(other.sandbox_id == sandbox.sandbox_id for other in Sandbox.list(status="running", **access))
    sandbox.kill()
    with pytest.raises(NotFoundError, match="not found"):
        sandbox.kill()
    with pytest.raises(NotFoundError):
        Sandbox.connect(sandbox.sandbox_id, **access)


def test_lists_have_pages_and_filters(access):
    """44."""
    made = [Sandbox.create(template="base", timeout_seconds=60, **access) for _ in range(3)]
    try:
        ids = {sandbox.sandbox_id for sandbox in made}
        found, cursor = [], ""
        while cursor is not None:
            status, page = call(access, "GET", f"/v1/sandboxes?status=running&limit=1&cursor={cursor}")
            assert status == 200 and len(page["data"]) == 1 and page["has_more"] == (page["next_cursor"] is not None)
            found += [row["id"] for row in page["data"]]
            cursor = page["next_cursor"]
        assert ids <= set(found) and len(found) == len(set(found))
        assert {sandbox.sandbox_id for sandbox in Sandbox.iter(**access)} >= ids
        assert call(access, "GET", "/v1/sandboxes?region=mars")[1]["data"] == []
        assert not ids & {row["id"] for row in call(access, "GET", "/v1/sandboxes?status=stopped")[1]["data"]}
    finally:
        for sandbox in made:
            sandbox.kill()


def test_pause_keeps_memory_and_connect_resumes(access):
    """40."""
    with Sandbox.create(template="base", timeout_seconds=120, **access) as sandbox:
        sandbox.commands.run("nohup sleep 1000 >/dev/null 2>&1 & echo $! > /workspace/pid")
        sandbox.pause()
        assert sandbox.get_info().status == "paused"
        sandbox.pause()
        assert call(access, "GET", "/health", token=sandbox.get_token()) == (200, {"status": "paused", "vm_id": sandbox.sandbox_id})
        status, body = call(access, "POST", "/commands/run", {"command": "true"}, token=sandbox.get_token())
        assert status == 409 and body["code"] == "SANDBOX_NOT_RUNNING" and "resume" in body["message"]
        again = Sandbox.connect(sandbox.sandbox_id, **access)
        assert again.commands.run("kill -0 $(cat /workspace/pid) && echo alive").stdout == "alive\n"


def test_stop_keeps_files_and_start_boots_them(access):
    """41, 42."""
    with Sandbox.create(template="base", timeout_seconds=120, **access) as sandbox:
        sandbox.commands.run("echo kept > /workspace/file; nohup sleep 1000 >/dev/null 2>&1 & echo $! > /workspace/pid")
        path = f"/v1/sandboxes/{sandbox.sandbox_id}"
        assert call(access, "POST", path + "/stop") == (200, {"id": sandbox.sandbox_id, "status": "stopped"})
        assert [row["id"] for row in call(access, "GET", "/v1/sandboxes?status=stopped")[1]["data"]] == [sandbox.sandbox_id]
        with pytest.raises(HopxError, match="stopped"):
            Sandbox.connect(sandbox.sandbox_id, **access)
        for verb, word in (("pause", "start it"), ("resume", "start it")):
            status, body = call(access, "POST", f"{path}/{verb}")
            assert status == 409 and word in body["error"]["message"], body
        assert call(access, "POST", path + "/start") == (200, {"id": sandbox.sandbox_id, "status": "running"})
        assert sandbox.files.read("/workspace/file") == "kept\n"
        assert sandbox.commands.run("pgrep -x sleep").exit_code == 1


def test_timeouts_are_set_and_tokens_refreshed(access, shared):
    """46: by hand; the old token stays good."""
    shared.set_timeout(200)
    assert 190 < shared.get_time_to_expiry() <= 200
    first = shared.get_token()
    shared.refresh_token()
    for token in (first, shared.get_token()):
        assert call(access, "GET", "/ping", token=token)[0] == 200
    assert shared.get_expiry_info().has_timeout and shared.is_healthy()


def test_a_token_that_is_near_its_end_is_refreshed_by_the_client(access):
    """39, 46: without being asked, before the call that needs it; by connect to a running one, too."""
    with Sandbox.create(template="base", timeout_seconds=60, **access) as sandbox:
        hours_left = lambda: (_token_cache[sandbox.sandbox_id].expires_at - datetime.datetime.now(datetime.timezone.utc)).total_seconds() / 3600
        nearly_over = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=30)
        for call in (lambda: sandbox, lambda: Sandbox.connect(sandbox.sandbox_id, **access)):
            _token_cache[sandbox.sandbox_id].expires_at = nearly_over
            assert call().commands.run("echo refreshed").stdout == "refreshed\n"
            assert hours_left() > 24


def test_templates_are_listed_and_shown(access):
    assert "base" in [template.name for template in Sandbox.list_templates(**access)]
    template = Sandbox.get_template("base", **access)
    assert (template.status, template.is_active, template.default_resources.vcpu) == ("active", True, 2)
    with pytest.raises(TemplateNotFoundError, match="no-such-template"):
        Sandbox.create(template="no-such-template", **access)


def test_a_template_is_built_from_files_and_steps(access, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("1")
    (tmp_path / "two.txt").write_text("2")
    name = f"hopx-{time.time_ns()}"
    template = Template(from_image="stillbox/base").copy(["one.txt", "two.txt"], "/home/user/app").set_env("BUILT", "yes")
    template.run_cmd("cat /home/user/app/*.txt > /home/user/sum").set_start_cmd("python3 -m http.server 8000", ReadyCheck(ReadyCheckType.PORT, port=8000))
    lines = []
    options = BuildOptions(name=name, cpu=1, memory=512, context_path=str(tmp_path), on_log=lambda line: lines.append(line["message"]), **access)
    built = asyncio.run(Template.build(template, options))
    with Sandbox.create(template=name, timeout_seconds=60, **access) as sandbox:
        assert sandbox.commands.run("cat /home/user/sum; echo $BUILT; curl -s localhost:8000 | head -c 9").stdout == "12yes\n<!DOCTYPE"
    assert any("http.server" in line or "/home/user/sum" in line for line in lines), lines
    with pytest.raises(Exception, match="exists already"):
        asyncio.run(Template.build(template, options))
    assert Sandbox.delete_template(built.template_id, **access)["deleted"]


def test_health_needs_no_key(access):
    assert Sandbox.health_check(base_url=access["base_url"]) == {"status": "ok"}


def test_wrong_requests_are_told_what_is_wrong(access, shared):
    """43, among others."""
    with pytest.raises(AuthenticationError, match="stillbox env"):
        Sandbox.list(api_key="hopx_live_wrong", base_url=access["base_url"])
    with pytest.raises(ValidationError, match="timeout_seconds is 0"):
        Sandbox.create(template="base", timeout_seconds=0, **access)
    with pytest.raises(ValidationError, match="status is 'asleep'"):
        Sandbox.list(status="asleep", **access)
    with pytest.raises(NotFoundError, match="Sandbox nonsense not found"):
        Sandbox.connect("nonsense", **access)
    for method, path, body, status, word in (
        ("POST", "/v1/sandboxes", b"{", 400, "line 1"),
        ("POST", "/v1/sandboxes", {}, 400, "template_name"),
        ("POST", "/v1/sandboxes", {"template_name": "base", "env_vars": {"A": 1}}, 400, "env_vars.A"),
        ("PUT", f"/v1/sandboxes/{shared.sandbox_id}/timeout", {"timeout_seconds": -1}, 400, "timeout_seconds"),
        ("GET", "/v1/sandboxes?limit=0", None, 400, "limit is '0'"),
        ("GET", "/v1/sandboxes?cursor=x", None, 400, "cursor"),
        ("GET", "/v1/nothing", None, 404, "/v1/nothing"),
        ("PATCH", "/v1/sandboxes", None, 405, "PATCH"),
    ):
        given, answer = call(access, method, path, body)
        assert given == status and word in answer["message"] and answer["error"]["message"] == answer["message"], answer
        assert answer["request_id"] and answer["error"]["request_id"] == answer["request_id"]


def test_a_token_opens_one_sandbox_and_nothing_else(access, shared):
    token = shared.get_token()
    assert call(access, "GET", f"/v1/sandboxes/{shared.sandbox_id}", token=token)[0] == 401
    status, body = call(access, "GET", "/info", token=token[:-3] + "abc")
    assert (status, body["code"]) == (401, "INVALID_TOKEN")
    with Sandbox.create(template="base", timeout_seconds=60, **access) as other:
        other.files.write("/workspace/mine", "x")
        assert call(access, "GET", "/files/exists?path=/workspace/mine", token=token)[1]["exists"] is False
        other_token = other.get_token()
    status, body = call(access, "GET", "/info", token=other_token)
    assert (status, body["code"]) == (404, "SANDBOX_NOT_FOUND")


# ---------------------------------------------------------------- inside


def test_commands_have_environment_directory_and_timeout(shared):
    assert shared.commands.run("echo $GREETING $B; pwd", env={"B": "2"}, working_dir="/tmp").stdout == "hello 2\n/tmp\n"
    cut = shared.commands.run("echo before; sleep 30; echo after", timeout=1)
    assert (cut.stdout, cut.exit_code) == ("before\n", 124) and "timed out after 1 s" in cut.stderr and cut.execution_time < 3
    assert shared.commands.run("pgrep -fx 'sleep 30'").exit_code == 1
    with pytest.raises(FileOperationError, match="/nowhere"):
        shared.commands.run("true", working_dir="/nowhere")


def test_a_repeated_request_never_runs_code_twice(access, shared):
    """The client repeats what it had no answer to; the server answers in time, so that it never does."""
    result = shared.run_code("echo once >> /workspace/runs; sleep 20", language="bash", timeout=1)
    assert not result.success and result.exit_code == 124
    assert shared.files.read("/workspace/runs") == "once\n"


def test_files_are_written_read_listed_and_removed(shared, tmp_path):
    files = shared.files
    files.write("/workspace/a/b.txt", "text ü", mode="0600")
    assert files.read("/workspace/a/b.txt") == files.read("a/b.txt") == "text ü"
    files.write_bytes("/workspace/a/c.bin", bytes(range(256)))
    assert files.read_bytes("/workspace/a/c.bin") == bytes(range(256))
    listed = {entry.name: entry for entry in files.list("/workspace/a")}
    assert listed["b.txt"].permissions == "-rw-------" and listed["c.bin"].size == 256 and listed["b.txt"].is_file
    assert listed["b.txt"].modified_time.tzinfo is not None
    local = tmp_path / "local"
    local.write_bytes(b"\x00\xff" * 300_000)
    files.upload(str(local), "/workspace/up")
    files.download("/workspace/up", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    files.mkdir("/workspace/a/d/e")
    files.mkdir("/workspace/a/d/e")
    assert files.exists("/workspace/a/d/e") and not files.exists("/workspace/nothing")
    files.remove("/workspace/a")
    assert not files.exists("/workspace/a")
    assert shared.commands.run("stat -c %U /workspace/up").stdout == "user\n"


def test_file_errors_name_the_path(access, shared):
    files = shared.files
    for action in (files.read, files.read_bytes, files.list, files.remove):
        with pytest.raises(FileNotFoundError, match="/workspace/none"):
            action("/workspace/none")
    files.write("/workspace/plain", "x")
    with pytest.raises(FileOperationError, match="plain"):
        files.mkdir("/workspace/plain/below")
    with pytest.raises(FileOperationError, match="directory"):
        files.read("/workspace")
    for path, body, word in (
        ("/files/write", {"path": "x", "content": "y", "mode": "rwx"}, "mode is 'rwx'"),
        ("/files/write", {"path": "x", "content": "%", "encoding": "base64"}, "base64"),
        ("/files/write", {"path": "x"}, "content"),
        ("/files/write", {"path": "", "content": ""}, "path is empty"),
        ("/files/write", {"path": "plain", "content": "", "overwrite": False}, "already exists"),
        ("/commands/run", {"command": "true", "timeout": 0}, "timeout is 0"),
        ("/commands/run", {"command": " "}, "command is empty"),
        ("/commands/run", {"command": "no-such-program", "args": ["x"]}, "no-such-program"),
        ("/execute", {"code": "1", "language": "cobol"}, "cobol"),
        ("/execute", {"language": "python"}, "code"),
    ):
        status, answer = call(access, "POST", path, body, token=shared.get_token())
        assert 400 <= status < 500 and status != 429 and word in answer["message"] == answer["error"], answer


def test_variables_are_kept_unmasked_and_deleted_one_by_one(shared):
    assert shared.env.get_all() == {"GREETING": "hello"}
    shared.env.set("API_KEY", "secret")
    assert shared.env.update({"B": "1"}) == {"GREETING": "hello", "API_KEY": "secret", "B": "1"}
    assert shared.commands.run("echo $API_KEY $B", env={"B": "2"}).stdout == "secret 2\n"
    shared.env.delete("B")
    assert shared.env.get("API_KEY") == "secret" and shared.env.get("B") is None
    assert shared.env.set_all({"GREETING": "hello"}) == {"GREETING": "hello"}
    assert shared.commands.run("echo [$API_KEY]").stdout == "[]\n"


def test_variables_that_were_set_survive_a_pause(access):
    with Sandbox.create(template="base", timeout_seconds=120, env_vars={"A": "1"}, **access) as sandbox:
        sandbox.env.set("B", "2")
        sandbox.pause()
        assert Sandbox.connect(sandbox.sandbox_id, **access).commands.run("echo $A $B").stdout == "1 2\n"


def test_code_runs_in_the_background_and_is_killed(shared):
    job = shared.run_code_background("import time; time.sleep(1000)", name="sleeper")
    assert job["status"] == "running"
    listed = {process["process_id"]: process for process in shared.list_processes()}
    assert (listed[job["process_id"]]["name"], listed[job["process_id"]]["status"]) == ("sleeper", "running")
    shared.kill_process(job["process_id"])
    status = {process["process_id"]: process["status"] for process in shared.list_processes()}
    assert status[job["process_id"]] == "killed"
    assert "Background process started" in shared.commands.run("sleep 1000", background=True).stdout
    running = [process for process in shared.list_system_processes() if process["status"] == "running"]
    assert any(process["command"] == "sleep 1000" for process in running)
    for process in running:
        shared.kill_process(process["process_id"])


def test_other_languages_run(shared):
    assert shared.run_code("console.log([1, 2].map((x) => x * 2).join())", language="javascript").stdout == "2,4\n"
    assert shared.run_code("for i in 1 2; do echo $i; done; cat", language="bash").stdout == "1\n2\n"
    # What is not in the template is not promised either.
    assert shared.get_agent_info()["features"]["languages"] == ["python", "javascript", "bash"]


def test_output_is_streamed_as_it_comes(shared):
    async def stream():
        code = "import sys, time; print('one', flush=True); time.sleep(0.3); print('two', file=sys.stderr, flush=True); sys.exit(3)"
        return [message async for message in shared.run_code_stream(code, env={"A": "1"})]

    messages = asyncio.run(stream())
    texts = {kind: "".join(message["data"] for message in messages if message["type"] == kind) for kind in ("stdout", "stderr")}
    assert texts == {"stdout": "one\n", "stderr": "two\n"}
    assert [message["type"] for message in messages[-2:]] == ["result", "complete"]
    assert messages[-2]["exit_code"] == 3 and messages[-1]["success"] is False


def test_a_terminal_echoes_resizes_and_exits(shared):
    async def talk():
        shown = ""
        async with await shared.terminal.connect() as socket:
            await shared.terminal.resize(socket, 123, 45)
            await shared.terminal.send_input(socket, "stty size; echo ü-$GREETING; exit 7\n")
            async for message in shared.terminal.iter_output(socket):
                if message["type"] == "exit":
                    return shown, message["code"]
                shown += message["data"]

    shown, code = asyncio.run(asyncio.wait_for(talk(), 30))
    assert "45 123" in shown and "ü-hello" in shown and code == 7


def test_changes_of_files_are_watched(shared):
    async def watch():
        seen = []
        async for message in shared.files.watch("/workspace"):
            if message["type"] == "watching":
                await asyncio.to_thread(shared.commands.run, "mkdir -p new/deep; echo x > new/deep/file; rm new/deep/file")
            else:
                seen.append((message["event"], message["path"]))
            if seen and seen[-1] == ("deleted", "/workspace/new/deep/file"):
                return seen

    seen = asyncio.run(asyncio.wait_for(watch(), 30))
    assert ("created", "/workspace/new") in seen and ("created", "/workspace/new/deep/file") in seen


def test_the_agent_tells_of_itself(access, shared):
    assert shared.get_agent_info()["vm_id"] == shared.sandbox_id
    metrics = shared.get_metrics_snapshot()
    assert metrics["system"]["memory"]["total"] == 1 << 30 and metrics["total_requests"] > 0 and metrics["process"]["count"] >= 0
    assert shared.cache.stats()["cache"]["size"] == 0 and shared.cache.clear()["entries_removed"] == 0
    request = urllib.request.Request(access["base_url"] + "/metrics/prometheus", headers={"Authorization": f"Bearer {shared.get_token()}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    assert "\nhopx_system_memory_total_bytes 1073741824\n" in text and "# TYPE hopx_agent_requests_total counter" in text


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes callbacks; the first one fails, as servers do."""

    calls = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(503 if len(self.calls) == 1 else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_end_of_an_execution_is_told_and_signed(shared):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{receiver.server_port}/told?x=1"
        answer = shared.run_code_async("print('done')", url, callback_headers={"X-Mine": "yes"}, callback_signature_secret="secret")
        assert (answer["status"], answer["callback_url"]) == ("queued", url)
        deadline = time.monotonic() + 20
        while len(Receiver.calls) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        receiver.shutdown()
    path, headers, body = Receiver.calls[-1]
    told = json.loads(body)
    assert path == "/told?x=1" and headers["x-mine"] == "yes" and abs(int(headers["x-hopx-timestamp"]) - time.time()) < 30
    assert (told["execution_id"], told["status"], told["stdout"]) == (answer["execution_id"], "completed", "done\n")
    assert headers["x-hopx-signature"] == "sha256=" + hmac.new(b"secret", body, "sha256").hexdigest()


def test_callbacks_into_private_networks_are_refused(shared):
    for url in ("http://10.0.0.1/", "http://169.254.169.254/latest/meta-data", "http://[::ffff:10.0.0.1]/", "file:///etc/passwd", "http:///x"):
        with pytest.raises(AgentError, match="callback_url"):
            shared.run_code_async("print(1)", url)


def test_there_is_no_desktop_and_it_is_said_why(shared):
    with pytest.raises(DesktopNotAvailableError) as caught:
        shared.desktop.screenshot()
    assert "xdotool" in caught.value.missing_dependencies


def test_the_asynchronous_client_works_as_well(access):
    async def everything():
        async with await AsyncSandbox.create(template="base", timeout_seconds=60, env_vars={"A": "1"}, **access) as sandbox:
            await sandbox.files.write("/workspace/with space.txt", "x")
            assert await sandbox.files.read("/workspace/with space.txt") == "x"
            assert (await sandbox.commands.run("echo $A")).stdout == "1\n"
            job = await sandbox.run_code_background("while True: pass")
            assert (await sandbox.kill_process(job["process_id"]))["success"]
            assert (await sandbox.get_metrics_snapshot())["total_requests"] > 0
            assert (await sandbox.env.get_all()) == {"A": "1"}

    asyncio.run(everything())


# ---------------------------------------------------------------- beside E2B


def test_one_sandbox_is_seen_with_both_sdks(access):
    """45, 47: by REST the same sandbox."""
    from e2b import Sandbox as E2bSandbox

    made = E2bSandbox.create(timeout=60, envs={"A": "1"})
    try:
        made.files.write("/workspace/note", "from e2b")
        seen = Sandbox.connect(made.sandbox_id, **access)
        assert call(access, "GET", f"/v1/sandboxes/{made.sandbox_id}")[1]["status"] == "running"
        assert seen.files.read("/workspace/note") == "from e2b"
        assert seen.commands.run("echo $A").stdout == "1\n"
        seen.env.set("B", "2")
        assert made.commands.run("echo $B").stdout == "2\n"
    finally:
        made.kill()
    with Sandbox.create(template="base", timeout_seconds=60, **access) as sandbox:
        assert E2bSandbox.connect(sandbox.sandbox_id, timeout=60).commands.run("echo seen").stdout == "seen\n"
