#!/usr/bin/env bash
# Starts the server with the base template, runs the demo on it, and stays until Ctrl-C; with `once` it stops after the
# demo and answers with the demo's exit code. Called by `make run` and `make demo`.
set -euo pipefail

stillbox=${STILLBOX_BIN:-$(cd "$(dirname "$0")/.." && pwd)/target/release/stillbox}
# Which program to run is this script's business; the server refuses variables that it does not know.
unset STILLBOX_BIN
mode=${1:-stay}
server=

stop_server() {
    [ -n "$server" ] || return 0
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

[ "$(id -u)" = 0 ] || { echo "stillbox: sandboxes need root: sudo make run" >&2; exit 1; }

"$stillbox" template build base
"$stillbox" serve &
server=$!

# Until the server answers; if it ends before, its own last line said why.
deadline=$((SECONDS + 60))
until "$stillbox" sandbox ls >/dev/null 2>&1; do
    kill -0 "$server" 2>/dev/null || { wait "$server" && code=0 || code=$?; server=; echo "stillbox: the server ended with $code before it answered" >&2; exit 1; }
    [ $SECONDS -lt $deadline ] || { echo "stillbox: the server does not answer after 60 s; its log is above" >&2; exit 1; }
    sleep 0.1
done

demo=0
"$stillbox" demo || demo=$?
if [ "$mode" = once ]; then
    stop_server
    exit "$demo"
fi
cat <<TEXT

The server runs until you press Ctrl-C. In another terminal:

  eval "\$($stillbox env)"
  python3 -c "from e2b import Sandbox; s = Sandbox.create(); print(s.commands.run('id').stdout); s.kill()"

For cells with state, charts and rich results (e2b-code-interpreter), once, about a minute; the server need not be stopped:

  $stillbox template build code-interpreter

TEXT
wait "$server"
