#!/usr/bin/env bash
# What a change must pass before it is read: format, lints as errors, the house's layout, licences and sources.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 1
status=0
part() { echo "== $1"; shift; "$@" || { status=1; echo "== FAILED"; }; }

part "format" cargo fmt --all --check
# Release, and one package at a time: what the lints need built, `make build` and `make test` have built in just that way.
part "lints" cargo clippy --release --locked --package stillbox --all-targets -- -D warnings
part "lints of the agent" cargo clippy --release --locked --package stillbox-agent --all-targets -- -D warnings
part "layout" cargo test --release --locked --quiet --test tidy
if command -v cargo-deny >/dev/null; then
    part "licences and sources" cargo deny --locked check
else
    echo "== licences and sources: NOT CHECKED, cargo-deny is not installed (cargo install --locked cargo-deny)"
fi
exit "$status"
