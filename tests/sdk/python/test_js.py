"""Runs the JavaScript SDK's tests against the same server; node prints one line per test."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest


@pytest.mark.skipif("not config.getoption('--js')", reason="the runner names the folder with the npm packages once, by --js")
def test_the_javascript_sdk_passes(request, server):
    modules = pathlib.Path(request.config.getoption("--js"))
    for file in (pathlib.Path(__file__).parent.parent / "js").glob("*.mjs"):
        shutil.copy(file, modules)
    files = sorted(str(file) for file in modules.glob("*.test.mjs"))
    result = subprocess.run(["node", "--test", "--test-force-exit", *files], capture_output=True, text=True, timeout=600, env={**os.environ, **server.environment()}, cwd=modules)
    failed = re.search(r"^# fail (\d+)|^ℹ fail (\d+)", result.stdout, re.MULTILINE)
    assert result.returncode == 0 and failed, result.stdout[-6000:] + result.stderr[-2000:]
