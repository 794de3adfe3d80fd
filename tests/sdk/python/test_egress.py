"""network.rules and stored secrets with the real SDK: what a program inside sends, and what arrives outside."""

import json

import pytest
from outside import NAME


@pytest.fixture
def options(reaching):
    environment = reaching.environment()
    return {"api_key": environment["E2B_API_KEY"], "api_url": environment["E2B_API_URL"], "sandbox_url": environment["E2B_SANDBOX_URL"]}


def fetched(sandbox, url=f"https://{NAME}/", flags=""):
    """What the outside saw of a request by curl, which trusts what every program inside trusts."""
    return json.loads(sandbox.commands.run(f"curl -sS --max-time 20 {flags} {url}").stdout)


def rules(**headers):
    return {"rules": {NAME: [{"transform": {"headers": {name.replace("_", "-"): value for name, value in headers.items()}}}]}}


def test_headers_of_a_rule_arrive_outside_and_are_nowhere_inside(options):
    from e2b import Sandbox

    sandbox = Sandbox.create(timeout=60, network=rules(Authorization="Bearer s3cret"), **options)
    for url in (f"https://{NAME}/a?b=c", f"http://{NAME}/a?b=c"):
        seen = fetched(sandbox, url, "-H 'Authorization: guess' -H 'X-Own: kept' -d body")
        assert (seen["path"], seen["body"]) == ("/a?b=c", "body")
        assert seen["headers"]["authorization"] == "Bearer s3cret" and seen["headers"]["x-own"] == "kept"
    python = f"import urllib.request; print(urllib.request.urlopen('https://{NAME}/').read().decode())"
    assert json.loads(sandbox.commands.run(f'python3 -c "{python}"').stdout)["headers"]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in sandbox.commands.run("env; cat /proc/self/environ").stdout
    shown = sandbox.get_info().network
    assert shown["rules"][NAME][0]["transform"]["headers"] == {"Authorization": "***"}

    sandbox.update_network(rules(x_new="second"))
    seen = fetched(sandbox)["headers"]
    assert seen["x-new"] == "second" and "authorization" not in seen
    sandbox.pause()
    sandbox.connect(**options)
    assert fetched(sandbox)["headers"]["x-new"] == "second", "after a resume"
    sandbox.kill()


HTTP_2 = """
const client = require('http2').connect('https://%s')
const request = client.request({ ':path': '/x', 'x-own': 'kept' })
let text = ''
request.setEncoding('utf8')
request.on('data', data => { text += data }).on('end', () => { console.log(text); client.close() })
client.on('error', error => { console.log(error); process.exit(1) })
"""


def test_a_client_that_speaks_http_2_and_nothing_else_has_its_headers_set_too(options):
    from e2b import Sandbox

    sandbox = Sandbox.create(timeout=60, network=rules(Authorization="Bearer s3cret"), **options)
    sandbox.files.write("/tmp/client.js", HTTP_2 % NAME)
    seen = json.loads(sandbox.commands.run("node /tmp/client.js", timeout=20).stdout)
    assert (seen["path"], seen["headers"]["authorization"], seen["headers"]["x-own"]) == ("/x", "Bearer s3cret", "kept")
    sandbox.kill()


def test_a_rule_with_too_much_is_refused_with_its_limit(options):
    from e2b import Sandbox, SandboxException

    with pytest.raises(SandboxException, match="21 headers; the limit is 20"):
        Sandbox.create(network=rules(**{f"x_{n}": "v" for n in range(21)}), **options)


def test_a_stored_secret_is_filled_in_on_the_way_and_never_told(options, reaching):
    from e2b import Sandbox, Secret, SecretNotFoundException

    api = {name: options[name] for name in ("api_key", "api_url")}
    made = Secret.create("Open-Key", "first-value", metadata={"team": "a"}, **api)
    assert (made.name, made.version, made.metadata, made.secret_id[:4]) == ("open-key", 1, {"team": "a"}, "sec_")
    sandbox = Sandbox.create(timeout=60, network=rules(Authorization=f"Bearer {Secret.fill('open-key')}"), **options)
    assert fetched(sandbox)["headers"]["authorization"] == "Bearer first-value"
    changed = Secret.update(made.secret_id, "second-value", **api)
    assert (changed.version, changed.metadata) == (2, {"team": "a"})
    assert fetched(sandbox)["headers"]["authorization"] == "Bearer second-value", "at once"
    assert [secret.name for secret in Secret.list(limit=1, **api).next_items()] == ["open-key"]
    assert Secret.destroy("open-key", **api) and not Secret.destroy("open-key", **api) and not Secret.exists("open-key", **api)
    with pytest.raises(SecretNotFoundException):
        Secret.get_info("open-key", **api)
    refused = sandbox.commands.run(f"curl -sS -w '%{{http_code}}' https://{NAME}/").stdout
    assert "open-key" in refused and refused.endswith("502")
    sandbox.kill()
    assert "-value" not in reaching.log()
