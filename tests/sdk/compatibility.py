#!/usr/bin/env python3
"""Writes docs/COMPATIBILITY.md from the JUnit results of upstream's own suites, run unmodified against a server.

usage: tests/sdk/compatibility.py REASONS.json NAME=RESULTS.xml… > docs/COMPATIBILITY.md
REASONS.json maps a part of a test's name, or of its failure's text, to why it fails here; a failure without a reason is
listed as one and makes the script end with 1.
"""

import collections
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def outcome(case):
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", (child.get("message") or "") + (child.text or "")
        if child.tag == "skipped":
            return "skipped", child.get("message") or ""
    return "passed", ""


def module(case):
    """Where a test is; of those that lie in an installed package, below its `tests`."""
    name = case.get("classname") or ""
    return name.partition(".tests.")[2] if "site-packages" in name else name


def area(case):
    """`tests.sync.sandbox_sync.commands.test_run` -> `sandbox commands`."""
    parts = [part for part in module(case).split(".") if part not in ("tests", "sync", "async", "shared")]
    return " ".join(part.removesuffix("_sync").removesuffix("_async").removeprefix("test_") for part in parts[:3]) or "other"


def reason_for(name, text, reasons):
    return next((why for part, why in reasons.items() if part in name or part in text), None)


def main():
    reasons = json.loads(pathlib.Path(sys.argv[1]).read_text())
    unexplained = 0
    print("# What upstream's own suites say\n")
    print("Written by tests/sdk/compatibility.py from result files; the suites are run unmodified from a folder outside this")
    print("repository, with the published packages, against `stillbox serve`.\n")
    for argument in sys.argv[2:]:
        name, path = argument.split("=", 1)
        counts, failures, skips = collections.defaultdict(collections.Counter), [], collections.Counter()
        for case in ElementTree.parse(path).iter("testcase"):
            what, text = outcome(case)
            counts[area(case)][what] += 1
            if what == "failed":
                where = f"{case.get('classname')}.{case.get('name')}"
                failures.append((f"{module(case)}.{case.get('name')}", reason_for(where, text, reasons)))
            if what == "skipped":
                skips[text[:100]] += 1
        total = sum(counts.values(), collections.Counter())
        print(f"## {name}\n\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped.\n")
        print("| area | passed | failed | skipped |\n|---|---|---|---|")
        for each, count in sorted(counts.items()):
            print(f"| {each} | {count['passed']} | {count['failed']} | {count['skipped']} |")
        if failures:
            print("\n| fails | why |\n|---|---|")
        for full, why in sorted(failures):
            unexplained += why is None
            print(f"| `{full}` | {why or '**unexplained**'} |")
        for text, count in skips.most_common():
            print(f"\nSkipped by the suite itself, {count}: {text}")
        print()
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
