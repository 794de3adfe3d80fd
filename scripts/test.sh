#!/usr/bin/env bash
# Everything that shows that stillbox works, on this machine, as root: rules, wire, kernel, SDKs. Each part runs even if
# an earlier one failed; the last line is the sum. A test that was skipped counts as failed: nothing is left out silently.
set -uo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top" || exit 1
log=$(mktemp "${TMPDIR:-/tmp}/stillbox-test.XXXXXX")
trap 'rm -f "$log" "$log.prepared"; kill $(jobs -p) 2>/dev/null' EXIT
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
# Release, because its dependencies and the program are built already; overflow checks are on in that profile too. One
# package at a time: together their features would be united, and half of what is built would be built again. The code
# blocks in documentation are illustrations, not tests.
targets=(--release --locked --lib --bins --tests --no-fail-fast)
# Most of the kernel's tests wait most of the time.
server_tests() { RUST_TEST_THREADS=4 cargo test --package stillbox "${targets[@]}" "$@"; }
# The agent under test is the static one that the release build has embedded: cargo's own, which the tests are built
# with, is not worth the optimiser's time.
agent_tests() {
    STILLBOX_AGENT_UNDER_TEST=$top/target/agent/stillbox-agent \
        cargo test --config profile.release.package.stillbox-agent.opt-level=0 --package stillbox-agent "${targets[@]}" "$@"
}

compile() { RUSTC_WRAPPER=$top/scripts/rustc-for-tests.sh server_tests --no-run && agent_tests --no-run; }

# What the kernel's and the SDKs' tests start from. It comes from the network and keeps no core busy, so it is made while
# cargo compiles; no test runs beside it.
prepare() {
    local sdks code=0
    tests/sdk/run --sdks &
    sdks=$!
    target/release/stillbox template build base --data-dir "$top/target/test-template" && tests/sdk/run --templates || code=1
    wait "$sdks" && return "$code"
}

prepare >"$log.prepared" 2>&1 &
preparing=$!
part "compile" compile
wait "$preparing"
prepared=$?
shown() { cat "$log.prepared"; return "$prepared"; }
part "templates, SDKs" shown
part "rules, wire, kernel" server_tests
part "agent" agent_tests
part "SDKs" tests/sdk/run

"$top/scripts/tally.sh" <"$log" || status=1
exit "$status"
