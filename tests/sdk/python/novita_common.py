"""What the Novita tests share: waiting, and programs that run inside."""

import importlib.metadata
import json
import time
import urllib.error
import urllib.request

VERSION = importlib.metadata.version("novita-sandbox")

# Counts in memory alone and answers with the count: proves that a process went on and was not started again.
COUNTER = """
import http.server, itertools
count = itertools.count(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(next(count)).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""


def until(is_so, what, seconds=15):
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def start_counter(sandbox):
    sandbox.files.write("/home/user/counter.py", COUNTER)
    sandbox.commands.run("python3 /home/user/counter.py", background=True, timeout=0)
    until(lambda: count(sandbox) is not None, "the counter answers")


def count(sandbox):
    """The next number of the counter, or nothing while it cannot be reached; asked from outside, over HTTPS."""
    try:
        return int(get(f"https://{sandbox.get_host(8000)}/"))
    except (OSError, urllib.error.URLError):
        return None


def get(url, headers={}):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read().decode()


def api(server, method, path, body=None, agent="novita-sandbox-python-sdk/2.1.1"):
    """A call of the control plane that no method of the SDK makes: its status and its JSON."""
    environment = server.environment("novita")
    headers = {"X-API-KEY": environment["NOVITA_API_KEY"], "User-Agent": agent, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(environment["NOVITA_API_URL"] + path, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read().decode())


def seconds_left(sandbox_or_info):
    info = sandbox_or_info.get_info() if hasattr(sandbox_or_info, "get_info") else sandbox_or_info
    return (info.end_at - info.started_at).total_seconds()


def bare(sandbox_id):
    return sandbox_id.split("-")[0]
