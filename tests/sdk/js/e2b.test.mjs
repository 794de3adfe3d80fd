// The unmodified JavaScript SDK against the server that the runner started (its environment is in process.env).
import assert from 'node:assert/strict'
import http from 'node:http'
import { after, before, test } from 'node:test'
import { Sandbox, CommandExitError, NotFoundError, TimeoutError } from 'e2b'

let sandbox
before(async () => {
  sandbox = await Sandbox.create({ timeoutMs: 300_000, metadata: { from: 'js' }, envs: { WHO: 'js' } })
})
after(async () => {
  await sandbox?.kill()
})

test('a command runs and its output, error and exit code come back', async () => {
  const result = await sandbox.commands.run('echo "$WHO"; id -un')
  assert.equal(result.stdout, 'js\nuser\n')
  await assert.rejects(sandbox.commands.run('echo no >&2; exit 4'), (error) => {
    assert.ok(error instanceof CommandExitError)
    assert.equal(error.exitCode, 4)
    assert.equal(error.stderr, 'no\n')
    return true
  })
})

test('a background command takes input, is listed and is killed', async () => {
  const handle = await sandbox.commands.run('read line; echo "got $line"; sleep 300', { background: true, stdin: true })
  await sandbox.commands.sendStdin(handle.pid, 'a line\n')
  const listed = await sandbox.commands.list()
  assert.ok(listed.some((process) => process.pid === handle.pid))
  assert.equal(await sandbox.commands.kill(handle.pid), true)
  await assert.rejects(handle.wait())
  assert.match(handle.stdout, /got a line/)
})

test('a command that takes too long is ended', async () => {
  await assert.rejects(sandbox.commands.run('sleep 60', { timeoutMs: 1000 }), TimeoutError)
})

test('a terminal echoes and has the size it was given', async () => {
  let seen = ''
  const decoder = new TextDecoder()
  const handle = await sandbox.pty.create({ cols: 100, rows: 30, onData: (data) => { seen += decoder.decode(data) } })
  await sandbox.pty.sendInput(handle.pid, new TextEncoder().encode('stty size; exit\n'))
  await handle.wait()
  assert.match(seen, /30 100/)
})

test('files are written, read, listed, moved and removed', async () => {
  await sandbox.files.write('dir/file.txt', 'grüß dich')
  assert.equal(await sandbox.files.read('dir/file.txt'), 'grüß dich')
  const bytes = new Uint8Array(1_000_000).map((_, index) => index % 251)
  await sandbox.files.write('dir/blob', new Blob([bytes]))
  assert.deepEqual(await sandbox.files.read('dir/blob', { format: 'bytes' }), bytes)
  assert.deepEqual((await sandbox.files.list('dir')).map((entry) => entry.name), ['blob', 'file.txt'])
  await sandbox.files.rename('dir/file.txt', 'dir/renamed.txt')
  assert.equal(await sandbox.files.exists('dir/file.txt'), false)
  await sandbox.files.remove('dir')
  assert.equal(await sandbox.files.exists('dir'), false)
  await assert.rejects(sandbox.files.read('dir/blob'), NotFoundError)
})

test('a watched folder reports what happens in it', async () => {
  await sandbox.files.makeDir('watched')
  const events = []
  const handle = await sandbox.files.watchDir('watched', (event) => { events.push(`${event.type} ${event.name}`) })
  await sandbox.files.write('watched/file', 'x')
  const deadline = Date.now() + 5000
  while (events.length < 3 && Date.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 20))
  await handle.stop()
  assert.deepEqual(events.slice(0, 3), ['create file', 'chmod file', 'write file'])
})

test('a signed URL opens a file', async () => {
  await sandbox.files.write('report', 'signed')
  const url = await sandbox.downloadUrl('report', { user: 'user' })
  assert.equal(await (await fetch(url)).text(), 'signed')
})

test('it is listed, described and measured', async () => {
  const paginator = Sandbox.list({ query: { metadata: { from: 'js' } } })
  const items = await paginator.nextItems()
  assert.ok(items.some((item) => item.sandboxId === sandbox.sandboxId))
  const info = await sandbox.getInfo()
  assert.equal(info.metadata.from, 'js')
  const metrics = await sandbox.getMetrics()
  assert.ok(metrics.length > 0 && metrics[0].memTotal > 0)
})

test('a server inside is reached under its host name', async () => {
  await sandbox.commands.run('python3 -m http.server 8001 --bind 127.0.0.1', { background: true, timeoutMs: 0 })
  await sandbox.commands.run('until ss -ltn | grep -q :8001; do sleep 0.05; done', { timeoutMs: 10_000 })
  const host = sandbox.getHost(8001)
  const { hostname, port } = new URL(process.env.E2B_SANDBOX_URL)
  const status = await new Promise((resolve, reject) => {
    // A connection of its own, read to its end: a kept one would keep node alive after the tests.
    http.get({ hostname, port, path: '/', agent: false, headers: { Host: host } }, (answer) => {
      answer.resume().on('end', () => resolve(answer.statusCode))
    }).on('error', reject)
  })
  assert.equal(status, 200)
})

test('a killed one is gone', async () => {
  const other = await Sandbox.create()
  assert.equal(await other.isRunning(), true)
  await other.kill()
  assert.equal(await other.isRunning(), false)
  await assert.rejects(Sandbox.connect(other.sandboxId), NotFoundError)
})
