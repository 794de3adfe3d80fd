#!/usr/bin/env python3
"""HopX's number of docs/SPECIFICATION.md: connect to a paused sandbox and the first run_code, as its Python SDK asks."""

import json
import os
import sys

from measure import Api, Server, Verdicts, machine, show, timed

TEMPLATE = "code-interpreter"


def call(api, method, path, body=None, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else None
    status, answer = api.call(method, path, body, headers)
    if status not in (200, 201):
        raise RuntimeError(f"{method} {path} answered {status}: {answer[:300]}")
    return json.loads(answer)


def connect_and_run(api, sandbox):
    """The calls of Sandbox.connect() and the first run_code(), one after the other, without the SDK's own cost."""
    path = f"/v1/sandboxes/{sandbox}"
    if call(api, "GET", path)["status"] != "paused":
        raise RuntimeError("the sandbox is not paused")
    call(api, "POST", path + "/resume")
    token = call(api, "POST", path + "/token/refresh")["auth_token"]
    call(api, "GET", path)
    call(api, "GET", "/health", token=token)
    code = {"language": "python", "code": "print(kept)", "workdir": "/workspace", "timeout": 120}
    if call(api, "POST", "/execute", code, token)["stdout"] != "yes\n":
        raise RuntimeError("the kernel has forgotten")


def main():
    print(machine())
    rounds = int(os.environ.get("ROUNDS", "20"))
    verdicts = Verdicts()
    server = Server(templates=("base", TEMPLATE), **{"sandbox.running_max": "8"}).start()
    try:
        api = Api(server)
        server.wait_for_dump(TEMPLATE)
        made = call(api, "POST", "/v1/sandboxes", {"template_name": TEMPLATE, "timeout_seconds": 600})
        call(api, "POST", "/execute", {"code": "kept = 'yes'"}, made["auth_token"])
        times = []
        for _ in range(rounds):
            call(api, "POST", f"/v1/sandboxes/{made['id']}/pause")
            times.append(timed(lambda: connect_and_run(api, made["id"]))[0])
        values = show("HopX: connect to a paused sandbox, first run_code", times)
        verdicts.hold("connect and first run_code", values["median"], 300, " ms")
    finally:
        server.remove()
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
