"""Programs as people run them."""

import json
import select
import sqlite3
import subprocess

from .ground import WAIT_S_MAX, place, same


def sqlite_keeps_open_transactions_in_both_journal_modes():
    folder = place("sqlite")
    connections = []
    for mode in ("wal", "delete"):
        connection = sqlite3.connect(folder / mode, isolation_level=None)
        connection.execute(f"pragma journal_mode={mode}")
        connection.execute("create table numbers (number integer)")
        connections.append(connection)
    rows = 0
    while True:
        for connection in connections:
            connection.execute("begin immediate")
            connection.execute("insert into numbers values (?)", (rows,))
        yield
        rows += 1
        for connection in connections:
            connection.execute("commit")
            same(connection.execute("select count(*) from numbers").fetchone(), (rows,), "rows")
            same(connection.execute("pragma integrity_check").fetchone(), ("ok",), "integrity")


NODE = r"""
const http = require('http'), { Worker } = require('worker_threads'), { spawn } = require('child_process');
const shared = new Int32Array(new SharedArrayBuffer(4));
const worker = new Worker(`
  const { parentPort, workerData } = require('worker_threads');
  setInterval(() => Atomics.add(workerData, 0, 1), 10);
  parentPort.on('message', n => parentPort.postMessage(n * n));
`, { eval: true, workerData: shared });
let ticks = 0; setInterval(() => ticks++, 10);
const echo = spawn('cat'), agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
const once = (from, event) => new Promise(resolve => from.once(event, resolve));
const later = () => new Promise(resolve => setTimeout(resolve, 10));
const server = http.createServer((request, answer) => answer.end(String(request.socket.remotePort)));
const get = () => new Promise((resolve, reject) => http.get({ port: server.address().port, host: '127.0.0.1', agent }, async answer => {
  let text = ''; for await (const part of answer) text += part; resolve(text);
}).on('error', reject));
const check = async () => {
  const seen = [Atomics.load(shared, 0), ticks];
  while (Atomics.load(shared, 0) <= seen[0] || ticks <= seen[1]) await later();
  worker.postMessage(12); const square = await once(worker, 'message');
  echo.stdin.write('echo'); const echoed = String(await once(echo.stdout, 'data'));
  return [square, echoed, await get()];
};
server.keepAliveTimeout = 0;
server.listen(0, '127.0.0.1', async () => {
  for await (const _ of process.stdin) process.stdout.write(JSON.stringify(await check()) + '\n');
});
"""


def node_keeps_its_http_server_worker_thread_and_child():
    node = subprocess.Popen(["node", "-e", NODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask():
        node.stdin.write(b"?\n")
        node.stdin.flush()
        assert select.select([node.stdout], [], [], WAIT_S_MAX)[0], f"node is silent (exit code {node.poll()})"
        return json.loads(node.stdout.readline())

    before = ask()
    same(before[:2], [144, "echo"], "node before any pause")
    while True:
        yield
        same(ask(), before, "node: worker, child, port of the connection that is kept alive")


BASH = r"""
declare -A kept=([a]=1 [b]='two words'); count=0; trap 'count=$((count+1))' USR1
cd /usr/share; sleep 1000 & sleeper=$!; coproc ECHO { while read -r line; do echo "co $line"; done; }
exec 7< <(printf 'first\nsecond\nthird\nfourth\nfifth\n')
while read -r _; do
  kill -USR1 $$; echo hello >&"${ECHO[1]}"; read -r answer <&"${ECHO[0]}"; read -r next <&7
  echo "${kept[b]}|$PWD|$(jobs -pr | grep -c "^$sleeper$")|$answer|$count|$next"
done
"""


def bash_keeps_its_variables_jobs_traps_and_coprocess():
    bash = subprocess.Popen(["bash", "-c", BASH], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask():
        bash.stdin.write(b"?\n")
        bash.stdin.flush()
        assert select.select([bash.stdout], [], [], WAIT_S_MAX)[0], f"bash is silent (exit code {bash.poll()})"
        return bash.stdout.readline().decode().strip()

    same(ask(), "two words|/usr/share|1|co hello|1|first", "bash before any pause")
    for count, line in enumerate(["second", "third", "fourth", "fifth"], 2):
        yield
        same(ask(), f"two words|/usr/share|1|co hello|{count}|{line}", "bash")
