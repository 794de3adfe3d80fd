import time
import uuid

import pytest
from e2b import Sandbox, SandboxQuery, SandboxState
from test_create import api


@pytest.fixture(scope="module")
def marked(server):
    """Five sandboxes that carry one mark, oldest first."""
    mark = str(uuid.uuid4())
    sandboxes = [Sandbox.create(timeout=300, metadata={"mark": mark, "n": str(n), "odd & strange=é": "a/b?c"}) for n in range(5)]
    yield mark, sandboxes
    for sandbox in sandboxes:
        sandbox.kill()


def pages(query, limit):
    paginator, found = Sandbox.list(query=query, limit=limit), []
    while paginator.has_next:
        found.append([item.sandbox_id for item in paginator.next_items()])
    return found


def test_pages_together_are_the_whole_list_newest_first(marked):
    mark, sandboxes = marked
    newest_first = [sandbox.sandbox_id for sandbox in reversed(sandboxes)]
    assert pages(SandboxQuery(metadata={"mark": mark}), 100) == [newest_first]
    assert pages(SandboxQuery(metadata={"mark": mark}), 2) == [newest_first[:2], newest_first[2:4], newest_first[4:]]


def test_metadata_filters_match_all_pairs_exactly_whatever_the_characters(marked):
    mark, sandboxes = marked
    one = pages(SandboxQuery(metadata={"mark": mark, "n": "3", "odd & strange=é": "a/b?c"}), 10)
    assert one == [[sandboxes[3].sandbox_id]]
    assert pages(SandboxQuery(metadata={"mark": mark, "n": "33"}), 10) in ([], [[]])


def test_pages_stay_stable_while_sandboxes_come_and_go(marked):
    mark, sandboxes = marked
    paginator = Sandbox.list(query=SandboxQuery(metadata={"mark": mark}), limit=2)
    first = [item.sandbox_id for item in paginator.next_items()]
    with Sandbox.create(metadata={"mark": mark}):
        rest = []
        while paginator.has_next:
            rest += [item.sandbox_id for item in paginator.next_items()]
    assert first + rest == [sandbox.sandbox_id for sandbox in reversed(sandboxes)]


def test_a_killed_sandbox_is_not_listed(server):
    mark = str(uuid.uuid4())
    with Sandbox.create(metadata={"mark": mark}) as sandbox:
        assert pages(SandboxQuery(metadata={"mark": mark}, state=[SandboxState.RUNNING]), 10) == [[sandbox.sandbox_id]]
    assert sum(pages(SandboxQuery(metadata={"mark": mark}), 10), []) == []


@pytest.mark.parametrize("query, word", [("limit=0", "limit"), ("limit=101", "limit"), ("nextToken=%21", "nextToken"), ("state=asleep", "state")])
def test_a_bad_query_is_a_400_that_names_the_parameter(server, query, word):
    status, body = api(server, "GET", f"/v2/sandboxes?{query}")
    assert status == 400 and word.lower() in body["message"].lower(), body


def test_metrics_begin_with_the_sandbox_and_stay_within_their_limits(server):
    with Sandbox.create() as sandbox:
        sandbox.commands.run("python3 -c 'x = bytearray(100 << 20); import time; time.sleep(3)'", background=True)
        deadline = time.monotonic() + 15
        while len(points := sandbox.get_metrics()) < 3 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert len(points) >= 3
        for point in points:
            assert point.cpu_count == 2 and 0 <= point.cpu_used_pct <= 100
            assert 0 < point.mem_used <= point.mem_total == 1 << 30
            assert 0 < point.disk_used < point.disk_total
        assert max(point.mem_used for point in points) > 100 << 20
        steps = [(b.timestamp - a.timestamp).total_seconds() for a, b in zip(points, points[1:])]
        assert all(step < 4 for step in steps), steps
    status, history = api(server, "GET", f"/sandboxes/{sandbox.sandbox_id}/metrics")
    assert status == 200 and len(history) >= len(points)


def test_the_log_of_a_sandbox_tells_what_was_run(server):
    with Sandbox.create() as sandbox:
        sandbox.commands.run("echo a-line-to-find")
        deadline = time.monotonic() + 10
        found = False
        while not found and time.monotonic() < deadline:
            status, body = api(server, "GET", f"/v2/sandboxes/{sandbox.sandbox_id}/logs?search=a-line-to-find")
            assert status == 200
            found = bool(body["logs"])
            time.sleep(0.2)
        assert found


def test_templates_are_listed_with_their_names(server):
    status, templates = api(server, "GET", "/templates")
    assert status == 200 and any("base" in template["aliases"] for template in templates), templates
    status, alias = api(server, "GET", "/templates/aliases/base")
    assert status == 200 and alias["templateID"]
