"""Runs the tests of Novita's JavaScript SDK against the same server; node prints one line per test."""

import os
import pathlib
import re
import shutil
import subprocess

TESTS = pathlib.Path(__file__).parent.parent / "js" / "novita"


def test_the_javascript_sdks_pass(request, server):
    folders = request.config.getoption("--novita-js")
    assert folders, "the runner names the folders with the npm packages, by --novita-js"
    for folder in map(pathlib.Path, folders):
        for file in TESTS.glob("*.mjs"):
            shutil.copy(file, folder)
        files = sorted(str(file) for file in folder.glob("*.test.mjs"))
        environment = {**os.environ, **server.environment("novita")}
        result = subprocess.run(["node", "--test", "--test-force-exit", *files], capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
        summary = re.search(r"^(?:#|ℹ) pass (\d+)", result.stdout, re.MULTILINE)
        assert result.returncode == 0 and summary and int(summary[1]) > 0, f"{folder}:\n{result.stdout[-6000:]}{result.stderr[-2000:]}"
