import json
import time
import urllib.error
import urllib.request

import pytest
from e2b import Sandbox, SandboxException


def api(server, method, path, body=None, key=None, headers=None):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method)
    request.add_header("X-API-KEY", key or server.environment()["E2B_API_KEY"])
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    data = None
    if body is not None:
        request.add_header("Content-Type", "application/json")
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request, data=data, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()


def test_a_new_sandbox_runs_a_command_and_keeps_a_file():
    with Sandbox.create() as sandbox:
        result = sandbox.commands.run("id -un; pwd; uname -s")
        assert result.stdout.split() == ["user", "/home/user", "Linux"]
        sandbox.files.write("a", "1")
        assert sandbox.files.read("a") == "1"
        assert sandbox.is_running()
    assert not sandbox.is_running()


def test_create_passes_environment_metadata_and_timeout():
    sandbox = Sandbox.create(timeout=77, envs={"GREETING": "hello world"}, metadata={"owner": "me & you"})
    try:
        assert sandbox.commands.run("echo $GREETING").stdout == "hello world\n"
        info = sandbox.get_info()
        assert info.metadata == {"owner": "me & you"}
        assert 70 < (info.end_at - info.started_at).total_seconds() <= 78
        assert info.template_id and info.cpu_count == 2 and info.memory_mb == 1024
    finally:
        sandbox.kill()


def test_what_the_base_template_promises_is_there(sandbox):
    result = sandbox.commands.run(
        "python3 --version; python --version; pip --version; node --version; npm --version; git --version; "
        "curl --version | head -1; sudo -n id -u; bash --version | head -1; ps --version; ip -V; tput -V; ls /etc/ssl/certs | wc -l"
    )
    assert "Python 3.13" in result.stdout and "\nv2" in result.stdout and "\n0\n" in result.stdout, result.stdout


def test_a_program_sees_its_own_identity_and_limits(sandbox):
    shown = sandbox.commands.run("hostname; cat /etc/hostname; cat /etc/machine-id; nproc; echo $E2B_SANDBOX $E2B_SANDBOX_ID").stdout.split()
    assert shown[0] == shown[1]
    assert len(shown[2]) == 32
    assert shown[-2:] == ["true", sandbox.sandbox_id]
    disk = sandbox.commands.run("df -B1 --output=size / | tail -1").stdout
    assert 18 << 30 < int(disk) <= 20 << 30


def test_two_sandboxes_share_nothing():
    with Sandbox.create() as one, Sandbox.create() as two:
        one.files.write("/tmp/secret", "x")
        assert not two.files.exists("/tmp/secret")
        ids = [s.commands.run("cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id").stdout for s in (one, two)]
        assert ids[0].split()[0] != ids[1].split()[0]
        assert ids[0].split()[1] != ids[1].split()[1]


def test_an_unknown_template_is_named_in_the_error():
    with pytest.raises(SandboxException, match="no-such-template"):
        Sandbox.create("no-such-template")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": 10**9}, "timeout"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"envVars": ["A"]}, "envVars"),
        ({"templateID": 5}, "templateID"),
        ({"network": {"denyOut": ["example.com"]}}, "denyOut"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(server, change, word):
    status, body = api(server, "POST", "/sandboxes", {"templateID": "base", **change})
    assert status == 400 and body["code"] == 400 and word in body["message"], body


def test_malformed_json_is_a_400_that_says_where(server):
    status, body = api(server, "POST", "/sandboxes", b'{"templateID": "base",')
    assert status == 400 and body["code"] == 400 and "line 1" in body["message"], body


def test_a_wrong_key_is_a_401(server):
    for key in ("e2b_" + "f" * 40, "nonsense"):
        status, body = api(server, "GET", "/v2/sandboxes", key=key)
        assert status == 401 and body["code"] == 401, body


def test_a_malformed_id_is_a_400_and_an_unknown_one_a_404(server):
    assert api(server, "GET", "/sandboxes/NOT--AN-ID")[0] == 400
    status, body = api(server, "GET", "/sandboxes/i" + "0" * 20)
    assert status == 404 and body["message"] == f'Sandbox "i{"0" * 20}" doesn\'t exist or you don\'t have access to it'


def test_the_same_idempotency_key_gives_the_same_sandbox(server):
    headers = {"Idempotency-Key": f"test-{time.time_ns()}"}
    body = {"templateID": "base", "timeout": 60}
    first = api(server, "POST", "/v2/sandboxes", body, headers=headers)
    again = api(server, "POST", "/v2/sandboxes", body, headers=headers)
    assert first[0] == again[0] == 201 and first[1]["sandboxID"] == again[1]["sandboxID"]
    other = api(server, "POST", "/v2/sandboxes", {"templateID": "base", "timeout": 61}, headers=headers)
    assert other[0] in (409, 422), other
    assert api(server, "DELETE", f"/sandboxes/{first[1]['sandboxID']}")[0] == 204


def test_what_is_not_served_yet_says_so_by_name(server):
    status, body = api(server, "POST", "/templates", {})
    assert status == 501 and "/templates" in body["message"], body
