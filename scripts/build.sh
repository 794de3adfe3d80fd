#!/usr/bin/env bash
# target/release/stillbox, one file. What waits for the network or keeps one core busy is done beside what keeps all of
# them busy: CRIU beside the download of the crates, the agent's link-time optimisation beside the server's dependencies.
set -euo pipefail

cd "$(dirname "$0")/.."
triple=$(rustc -vV | sed -n 's/^host: //p')
# Ends what still runs when this ends early; what runs in the background does not hear Ctrl-C.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

criu/build.sh target/criu/criu &
criu=$!
cargo fetch --quiet --locked --target "$triple"
agent/build.sh "$triple" &
agent=$!
wait "$criu"
# It embeds both: its build script waits for the agent's build, and finds it done.
cargo build --release --locked
wait "$agent"
