#!/usr/bin/env bash
# Builds the static agent that the stillbox binary embeds: `agent/build.sh TRIPLE` makes
# target/agent/TRIPLE/agent/stillbox-agent. build.rs calls it; scripts/build.sh does so earlier, to have it sooner.
#
# One profile and one target folder of its own, whatever is being built around it: an agent of another hash would void
# every dump. With --target, the flags reach the agent and not the build scripts and macros of its crates.
set -euo pipefail

cd "$(dirname "$0")/.."
unset RUSTC_WRAPPER RUSTC_WORKSPACE_WRAPPER CARGO_ENCODED_RUSTFLAGS
export RUSTFLAGS="-C target-feature=+crt-static"
exec "${CARGO:-cargo}" build --quiet --locked --package stillbox-agent --bin stillbox-agent --profile agent \
    --target "$1" --target-dir target/agent
