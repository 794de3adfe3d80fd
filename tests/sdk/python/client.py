"""Programs that use an SDK as its users do: in a process of their own, with an environment of theirs."""

import subprocess

from server import ENVIRONMENT


def environment_with(server, sdk, *names):
    """What any program has, and of `stillbox env` these variables alone."""
    known = server.environment(sdk)
    usual = {name: value for name, value in ENVIRONMENT.items() if name in ("PATH", "HOME", "LANG")}
    return {**usual, **{name: known[name] for name in names}}


def lines_of(command, environment, **options):
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()
