"""Novita's stored secrets with the real SDK: a variable holds a placeholder, and only the secret's hosts see the value."""

import json

import pytest
from novita_sandbox import Secret
from novita_sandbox.core import Sandbox
from novita_sandbox.core.exceptions import SandboxException
from outside import NAME


def test_a_bound_secret_reaches_its_hosts_and_nobody_inside(reaching, monkeypatch):
    # Over plain HTTP: the SDK keeps one transport per process, which trusts the session's server alone.
    known = reaching.environment("novita")
    for name, value in (("API_KEY", known["NOVITA_API_KEY"]), ("API_URL", known["NOVITA_API_URL"]), ("SANDBOX_URL", known["NOVITA_API_URL"])):
        monkeypatch.setenv(f"NOVITA_{name}", value)
    made = Secret.create(name="vendor.Key", value="sk-real", hosts=[" API.Outside.test "], description="of the vendor")
    assert (made.name, made.hosts, made.has_secret, made.status, made.description) == ("vendor.Key", [NAME], True, "ready", "of the vendor")
    assert "sk-real" not in json.dumps(made.__dict__)
    assert Secret.list() == [made] and Secret.get("vendor.Key") == made
    sandbox = Sandbox.create(template="base", timeout=60, secret_envs={"VENDOR_KEY": "vendor.Key"})
    assert sandbox.commands.run("echo $VENDOR_KEY").stdout.strip() == made.placeholder

    def fetched(host, flags='-H "Authorization: Bearer $VENDOR_KEY"', insecure=""):
        return json.loads(sandbox.commands.run(f"curl -sS {insecure} --max-time 20 {flags} https://{host}/q?key=$VENDOR_KEY").stdout)

    seen = fetched(NAME)
    assert seen["headers"]["authorization"] == "Bearer sk-real" and seen["path"] == "/q?key=sk-real"
    unencrypted = json.loads(sandbox.commands.run(f'curl -sS -H "X-Key: $VENDOR_KEY" http://{NAME}/').stdout)
    assert unencrypted["headers"]["x-key"] == made.placeholder, "not where others can read it"
    # Its certificate is not one that the sandbox trusts: nothing of ours is between.
    other = fetched("other.outside.test", insecure="-k")
    assert other["headers"]["authorization"] == f"Bearer {made.placeholder}"
    updated = Secret.update(name="vendor.Key", value="sk-new", hosts=[NAME])
    assert updated.placeholder == made.placeholder and fetched(NAME)["headers"]["authorization"] == "Bearer sk-new"
    sandbox.set_network(allow_out=[NAME], deny_out=["0.0.0.0/0"])
    assert fetched(NAME)["headers"]["authorization"] == "Bearer sk-new", "a new network keeps it"
    assert Secret.delete("vendor.Key") == "vendor.Key" and Secret.list() == []
    with pytest.raises(SandboxException, match="does not exist"):
        Sandbox.create(template="base", secret_envs={"VENDOR_KEY": "vendor.Key"})
    sandbox.kill()
    assert "sk-" not in reaching.log()
