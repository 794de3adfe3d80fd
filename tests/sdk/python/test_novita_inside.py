"""A sandbox sees public URLs as everybody else does: its own, another's, the API's, over https without any setting
(contract novita.md, A7 26; the guide's Python sample curls its own URL from inside)."""

import os
import shlex
import subprocess

import pytest
from novita_common import count, start_counter, until
from novita_sandbox.core import CommandExitException, Sandbox

PYTHON = "import urllib.request; print(urllib.request.urlopen('{url}', timeout=10).read().decode())"
NODE = "fetch('{url}').then((a) => a.text()).then(console.log)"


@pytest.fixture
def sandbox(server):
    sandbox = Sandbox.create(timeout=120)
    yield sandbox
    sandbox.kill()


def test_the_guides_sample_works_as_printed(sandbox):
    sandbox.files.write("/home/user/index.html", "hello")
    handle = sandbox.commands.run("python -m http.server 3000", background=True, timeout=0)
    url = f"https://{sandbox.get_host(3000)}"
    fetched = lambda: sandbox.commands.run(f"curl -s {url}/index.html || true").stdout
    assert until(lambda: fetched() == "hello", "curl fetches from inside")
    assert handle.kill()


def test_python_node_and_curl_reach_their_own_and_anothers_url(sandbox):
    other = Sandbox.create(timeout=60)
    for target in (sandbox, other):
        start_counter(target)
        seen = count(target)
        url = f"https://{target.get_host(8000)}/"
        for command in (f"curl -sS {url}", f'python3 -c "{PYTHON.format(url=url)}"', f'node -e "{NODE.format(url=url)}"'):
            seen += 1
            assert int(sandbox.commands.run(command).stdout) == seen, command
    other.kill()


def test_a_copy_and_a_resumed_sandbox_reach_urls_too(sandbox):
    start_counter(sandbox)
    url = f"https://{sandbox.get_host(8000)}/"
    [copy] = Sandbox.clone(sandbox.sandbox_id)
    assert int(copy.commands.run(f"curl -sS {url}").stdout) > 0
    copy.pause()
    copy.connect()
    assert int(copy.commands.run(f"curl -sS {url}").stdout) > 0
    copy.kill()


def test_the_api_is_reached_and_wants_its_key_as_from_outside(server, sandbox):
    domain = server.environment("novita")["NOVITA_DOMAIN"]
    answer = sandbox.commands.run(f"curl -sS -w '%{{http_code}}' https://api.{domain}/v2/sandboxes").stdout
    assert answer.endswith("401")


def test_who_may_not_go_out_does_not_come_back_in(server):
    closed = Sandbox.create(timeout=60, allow_internet_access=False)
    for host in (closed.get_host(49983), f"localhost:{server.tls_port}"):
        with pytest.raises(CommandExitException):
            closed.commands.run(f"curl -sS --max-time 5 https://{host}/health")
    closed.kill()


def test_another_domain_leads_inside_by_dns():
    """Names that are not below localhost: the slot's name server answers them."""
    from server import Server

    server = Server(domain="box.stillbox.test:443")
    try:
        server.start()
        created = server.cli("sandbox", "create").stdout.strip()
        script = f"curl -sS -o /dev/null -w '%{{http_code}} %{{remote_ip}}' https://api.box.stillbox.test/health && getent ahosts 1-x.box.stillbox.test"
        answer = server.cli("sandbox", "exec", created, "--", "bash", "-c", script).stdout
        assert answer.startswith("200 10.254.0.1") and "10.254.0.1" in answer.splitlines()[-1], answer
    finally:
        server.remove()


def test_hosts_leads_names_here_and_takes_them_back(server, tmp_path):
    """In a mount namespace of its own, with a file of its own over /etc/hosts: nothing global changes."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    before = open("/etc/hosts").read()
    stillbox = shlex.join(server.command())
    script = f"""
        mount --bind {hosts} /etc/hosts
        {stillbox} hosts --install --sdk novita --sdk hopx --sandbox i0 2>/dev/null
        getent ahostsv4 api.us-phx-1.sandbox.novita.ai && getent ahostsv4 api.hopx.dev && getent ahostsv4 49983-i0.stillbox.localhost
        {stillbox} doctor | grep -c 'stillbox hosts --install'
        {stillbox} hosts --remove
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STILLBOX_")}
    result = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, env=environment)
    assert all(f"127.0.0.1 {name}" in result.stdout for name in ("api.hopx.dev", "api.us-phx-1.sandbox.novita.ai", "49983-i0.stillbox.localhost")), result
    # Once or twice a name: glibc shows ::1 as 127.0.0.1 too when IPv4 is asked for.
    assert result.stdout.count("STREAM") in (3, 6), result
    assert "\n1\n" in result.stdout and hosts.read_text() == "127.0.0.1 localhost\n", result.stdout
    assert open("/etc/hosts").read() == before


def test_the_command_line_under_novitas_name_takes_its_verbs(server, sandbox, tmp_path):
    """16: metrics and clone, and the other verbs of `sandbox`."""
    from server import BINARY, ENVIRONMENT

    link = tmp_path / "novita-sandbox-cli"
    link.symlink_to(BINARY)
    environment = {**ENVIRONMENT, **{name: value for name, value in server.environment("novita").items() if name.startswith("NOVITA_")}}

    def cli(*words):
        result = subprocess.run([link, "sandbox", *words], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    until(lambda: "MiB" in cli("metrics", sandbox.sandbox_id), "there are metrics")
    copies = cli("clone", sandbox.sandbox_id, "-c", "2", "-s", "-t", "60").split()
    assert len(copies) == 2
    assert all(copy in cli("list") for copy in copies)
    cli("pause", copies[0])
    assert copies[0] in cli("list", "--state", "paused") and copies[1] not in cli("list", "--state", "paused")
    cli("resume", copies[0])
    cli("logs", copies[0])
    assert cli("kill", *copies).split() == copies
    made = cli("create", "--metadata", "cli=novita").strip()
    assert '"cli": "novita"' in cli("info", made)
    cli("kill", made)
