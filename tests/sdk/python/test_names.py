"""Clients that are told a domain and nothing else find the server by its own name server, in a mount namespace of their
own with files of their own over /etc/resolv.conf: nothing global changes."""

import os
import secrets
import shlex
import subprocess
import sys

import pytest
from server import ENVIRONMENT, Server, free_port

# No E2B_API_URL, no E2B_SANDBOX_URL, nothing in /etc/hosts: names are all that this program has.
CLIENT = """
import os, socket, urllib.request
from e2b import Sandbox
assert not [name for name in os.environ if name.startswith("E2B_") and name.endswith("_URL")]
sandbox = Sandbox.create(timeout=60)
print("ran", sandbox.commands.run("echo $((6 * 7))").stdout.strip())
sandbox.files.write("/home/user/index.html", "by name")
sandbox.commands.run("python3 -m http.server 8000", background=True)
for _ in range(50):
    try:
        print("fetched", urllib.request.urlopen(f"https://{sandbox.get_host(8000)}/index.html").read().decode())
        break
    except urllib.error.HTTPError:
        pass
print("cloud", socket.gethostbyname("api.hopx.dev"))
sandbox.kill()
"""


@pytest.fixture(scope="module")
def named():
    address = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
    server = Server()
    server.settings |= {"domain": f"box.stillbox.test:{server.tls_port}", "dns.listen": f"{address}:53", "dns.names": "api.hopx.dev"}
    server.dns = address
    yield server.start()
    server.remove()


def apart(script, tmp_path, before):
    """Runs `script` where /etc/resolv.conf is a file of the test's; gives what it printed and that file afterwards."""
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(before)
    script = f"set -e; mount --bind {resolv_conf} /etc/resolv.conf\n{script}"
    result = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    return result, resolv_conf.read_text()


def test_an_sdk_without_addresses_finds_everything_by_name(named, tmp_path):
    stillbox = shlex.join(named.command())
    variables = {name: value for name, value in named.environment().items() if not name.endswith("_URL")}
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    # Nobody listens there, and the kernel says so at once.
    before = "search lan\nnameserver 127.255.255.253\n"
    script = f"""
        {stillbox} doctor | grep -A1 'does not resolve' | head -1
        {stillbox} hosts --install --resolver --sdk hopx
        cat /etc/resolv.conf
        env -u E2B_API_URL -u E2B_SANDBOX_URL {exports} {sys.executable} -c {shlex.quote(CLIENT)}
        {stillbox} doctor | grep ' domain '
        {stillbox} hosts --remove
    """
    result, after = apart(script, tmp_path, before)
    printed = result.stdout
    assert "ran 42\nfetched by name\ncloud 127.0.0.1\n" in printed, result
    assert f"# stillbox: begin\nnameserver {named.dns}\n# stillbox: end\nsearch lan" in printed, printed
    assert f"by the server's own resolver at {named.dns}:53" in printed and "FIX:  domain" in printed, printed
    assert after == before
    assert named.dns not in open("/etc/resolv.conf").read()


def test_who_is_not_answered_for_is_not_installed(named, tmp_path):
    stillbox = shlex.join(named.command())
    nobody = shlex.join(named.command(f"--set=dns.listen=127.0.0.1:{free_port()}"))
    script = f"""
        {stillbox} hosts --install --resolver --sdk novita && exit 1
        {nobody} hosts --install --resolver && exit 1
        exit 0
    """
    before = "nameserver 127.255.255.253\n"
    result, after = apart(script, tmp_path, before)
    assert result.returncode == 0 and after == before, result
    assert "--set dns.names=api.us-phx-1.sandbox.novita.ai" in result.stderr and "no name server answers at" in result.stderr, result


def test_systemd_resolved_is_told_of_the_names_that_lead_here_and_untold(named, tmp_path):
    """With files as it has them and a systemctl that writes down what it is asked."""
    stillbox = shlex.join(named.command())
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f"#!/bin/sh\necho systemctl $* >> {tmp_path}/asked\n")
    systemctl.chmod(0o755)
    drop_in = "/etc/systemd/resolved.conf.d/stillbox.conf"
    script = f"""
        mount -t tmpfs none /run; mkdir -p /run/systemd/resolve; touch /run/systemd/resolve/resolv.conf
        mkdir -p {tmp_path}/systemd {tmp_path}/work; mount -t overlay -o lowerdir=/etc,upperdir={tmp_path}/systemd,workdir={tmp_path}/work none /etc
        mount --bind {tmp_path}/resolv.conf /etc/resolv.conf
        export PATH={systemctl.parent}:$PATH
        {stillbox} hosts --install --resolver
        cat {drop_in} {tmp_path}/asked /etc/resolv.conf
        {stillbox} hosts --remove
        ls {drop_in} || echo gone
    """
    before = "nameserver 127.0.0.53\n"
    result, after = apart(script, tmp_path, before)
    assert f"DNS={named.dns}:53\nDomains=~box.stillbox.test ~api.hopx.dev\nsystemctl try-restart systemd-resolved\n{before}" in result.stdout, result
    assert "gone" in result.stdout and after == before
    assert (tmp_path / "asked").read_text().count("try-restart") == 2
