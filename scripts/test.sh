#!/usr/bin/env bash
# Everything that shows that stillbox works, on this machine, as root: rules, wire, kernel, SDKs. Each part runs even if
# an earlier one failed; the last line is the sum. A test that was skipped counts as failed: nothing is left out silently.
set -uo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top" || exit 1
log=$(mktemp "${TMPDIR:-/tmp}/stillbox-test.XXXXXX")
trap 'rm -f "$log"' EXIT
status=0

part() { # name command…
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    if "$@" 2>&1 | tee -a "$log"; then
        echo "== $name: done in $((SECONDS - started)) s"
    else
        status=1
        echo "== $name: FAILED after $((SECONDS - started)) s"
    fi
}

[ "$(id -u)" = 0 ] || { echo "tests start sandboxes, which needs root: sudo make test" >&2; exit 1; }
# The kernel's and the SDKs' tests start from a finished template.
part "base template" target/release/stillbox template build base --data-dir "$top/target/test-template"
# Release, because its dependencies are built already; overflow checks are on in that profile too. One package at a
# time: together their features would be united, and half of what is built would be built again. The code blocks in
# documentation are illustrations, not tests.
targets=(--lib --bins --tests)
part "rules, wire, kernel" cargo test --release --locked --package stillbox "${targets[@]}" --no-fail-fast
# The static agent that the release build has just embedded, not cargo's dynamic one.
part "agent" env STILLBOX_AGENT_UNDER_TEST="$top/target/agent/stillbox-agent" \
    cargo test --release --locked --package stillbox-agent "${targets[@]}" --no-fail-fast
part "SDKs" tests/sdk/run

"$top/scripts/tally.sh" <"$log" || status=1
exit "$status"
