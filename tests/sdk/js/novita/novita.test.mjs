// What Novita's guide promises, with its unmodified JavaScript SDK: 1.0.1 and 2.1.1. The numbers are those of the
// statements in contract novita.md, A7.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { Sandbox } from 'novita-sandbox'

const version = JSON.parse(readFileSync('node_modules/novita-sandbox/package.json', 'utf8')).version
const isModern = !version.startsWith('1.')
const bare = (id) => id.split('-')[0]
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

async function until(isSo, what, ms = 15000) {
  const deadline = Date.now() + ms
  for (;;) {
    const found = await isSo()
    if (found) return found
    assert.ok(Date.now() < deadline, `not within ${ms} ms: ${what}`)
    await sleep(50)
  }
}

async function withSandbox(options, use) {
  const sandbox = await Sandbox.create(options)
  try {
    await use(sandbox)
  } finally {
    await sandbox.kill()
  }
}

const pause = (sandbox) => (sandbox.pause ? sandbox.pause() : sandbox.betaPause())
const counter = `
import http.server, itertools
count = itertools.count(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = str(next(count)).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
`

async function startCounter(sandbox) {
  await sandbox.files.write('/home/user/counter.py', counter)
  await sandbox.commands.run('python3 /home/user/counter.py', { background: true, timeoutMs: 0 })
  await until(() => count(sandbox), 'the counter answers')
}

// Fetched from outside, by the public URL (25, 26).
async function count(sandbox) {
  try {
    const answer = await fetch(`https://${sandbox.getHost(8000)}/`)
    return answer.ok ? Number(await answer.text()) : undefined
  } catch {
    return undefined
  }
}

test('commands, files, variables, info (1, 2, 3, 5, 17, 22)', () =>
  withSandbox({ timeoutMs: 60_000, metadata: { list: 'js', 'sp ace/é': 'a&b=c' }, envs: { A: 'sandbox' } }, async (sandbox) => {
    assert.equal((await sandbox.commands.run('echo $A; whoami')).stdout, 'sandbox\nuser\n')
    assert.equal((await sandbox.commands.run('echo $A', { envs: { A: 'command' } })).stdout, 'command\n')
    await assert.rejects(sandbox.commands.run('exit 3'), (error) => error.exitCode === 3)
    const written = await sandbox.files.write('dir/a b.txt', 'text')
    assert.equal(written.path, '/home/user/dir/a b.txt')
    assert.equal(await sandbox.files.read('dir/a b.txt'), 'text')
    assert.deepEqual((await sandbox.files.list('dir')).map((entry) => entry.name), ['a b.txt'])
    const info = await sandbox.getInfo()
    assert.equal(info.name, 'base')
    assert.deepEqual(info.metadata, { list: 'js', 'sp ace/é': 'a&b=c' })
    assert.ok(Math.abs(info.endAt - info.startedAt - 60_000) < 2000)
    await sandbox.setTimeout(200_000)
    assert.ok(Math.abs((await sandbox.getInfo()).endAt - Date.now() - 200_000) < 3000)
    const found = await Sandbox.list({ query: { metadata: { list: 'js', 'sp ace/é': 'a&b=c' } } }).nextItems()
    assert.deepEqual(found.map((row) => bare(row.sandboxId)), [bare(sandbox.sandboxId)])
  }))

test('a pause keeps memory and files; connect resumes (7, 10, 11, 12, 14)', () =>
  withSandbox({ timeoutMs: 60_000 }, async (sandbox) => {
    await startCounter(sandbox)
    const before = await count(sandbox)
    await pause(sandbox)
    assert.equal(await sandbox.isRunning(), false)
    assert.equal(await count(sandbox), undefined)
    // Paused before: no error, and 2.x tells it.
    const again = await pause(sandbox)
    if (isModern) assert.equal(again, false)
    const paused = await Sandbox.list({ query: { state: ['paused'] } }).nextItems()
    assert.ok(paused.some((row) => bare(row.sandboxId) === bare(sandbox.sandboxId)))
    const same = await Sandbox.connect(sandbox.sandboxId)
    assert.equal(await until(() => count(same), 'the service is back'), before + 1)
    assert.ok(Math.abs((await same.getInfo()).endAt - Date.now() - 300_000) < 3000)
  }))

test('a list is paged (20, 21) and a killed sandbox is gone (4, 6, 9)', async () => {
  const made = [await Sandbox.create({ timeoutMs: 60_000, metadata: { list: 'js-pages' } }), await Sandbox.create({ timeoutMs: 60_000, metadata: { list: 'js-pages' } })]
  const paginator = Sandbox.list({ query: { metadata: { list: 'js-pages' } }, limit: 1 })
  assert.ok(paginator.hasNext)
  assert.equal(bare((await paginator.nextItems())[0].sandboxId), bare(made[1].sandboxId))
  assert.ok(paginator.hasNext)
  assert.equal(bare((await paginator.nextItems())[0].sandboxId), bare(made[0].sandboxId))
  assert.equal(paginator.hasNext, false)
  for (const sandbox of made) assert.equal(await Sandbox.kill(sandbox.sandboxId), true)
  assert.equal(await Sandbox.kill(made[0].sandboxId), false)
  assert.equal(await made[0].isRunning(), false)
  await assert.rejects(Sandbox.connect(made[0].sandboxId))
})

test('metrics and auto-resume (15, 31)', () =>
  withSandbox({ timeoutMs: 60_000, metadata: { auto_resume: 'true' } }, async (sandbox) => {
    const [point] = await until(async () => {
      const points = await sandbox.getMetrics()
      return points.length > 0 && points
    }, 'there is a point')
    assert.ok(point.cpuCount > 0 && point.memTotal > 0)
    await pause(sandbox)
    assert.equal((await sandbox.commands.run('echo awake')).stdout, 'awake\n')
  }))

test('clones (32, 34, 35)', async (context) => {
  if (!isModern) return context.diagnostic('1.x has no clones')
  await withSandbox({ timeoutMs: 90_000 }, async (sandbox) => {
    await startCounter(sandbox)
    const before = await count(sandbox)
    const clones = await Sandbox.clone(sandbox.sandboxId, { count: 2, strict: true })
    assert.equal(clones.count, 2)
    const [one, other] = clones.sandboxes
    assert.equal(await until(() => count(one), 'a clone serves'), before + 1)
    assert.equal(await until(() => count(other), 'the other, too'), before + 1)
    assert.equal((await one.commands.run('echo clone')).stdout, 'clone\n')
    for (const clone of clones.sandboxes) assert.equal(await Sandbox.kill(clone.sandboxId), true)
    await assert.rejects(Sandbox.clone(sandbox.sandboxId, { count: 0 }), /count is 0/)
  })
})
