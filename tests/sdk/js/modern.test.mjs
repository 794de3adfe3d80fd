// What the newest JavaScript SDK offers beyond commands and files: stopped time, copies, lists, secrets, streams.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import { CommandExitError, E2B, Sandbox, Secret, SecretError, SecretNotFoundError, TimeoutError } from 'e2b'

const mark = randomUUID()
let sandbox
before(async () => {
  sandbox = await Sandbox.create({ timeoutMs: 300_000, metadata: { mark } })
})
after(async () => {
  for (const { sandboxId } of await all(Sandbox.list({ query: { metadata: { mark } } }))) await Sandbox.kill(sandboxId)
})

async function all(paginator) {
  const items = []
  while (paginator.hasNext) items.push(...await paginator.nextItems())
  return items
}

async function until(isSo) {
  const deadline = Date.now() + 10_000
  while (!await isSo()) {
    assert.ok(Date.now() < deadline, `never came true: ${isSo}`)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

test('a client with its own options does what the exports do with the environment', async () => {
  const client = new E2B({ apiKey: process.env.E2B_API_KEY })
  const own = await client.Sandbox.create({ timeoutMs: 60_000, metadata: { mark } })
  assert.equal((await own.commands.run('echo own')).stdout, 'own\n')
  assert.equal(await client.Template.exists('base'), true)
  assert.ok(Array.isArray(await client.Volume.list()))
  await own.kill()
})

test('a pause keeps processes, a pause without memory keeps files, a reboot drops what ran', async () => {
  const handle = await sandbox.commands.run('sleep 4242', { background: true, timeoutMs: 0 })
  await sandbox.files.write('kept', 'here')
  assert.equal(await sandbox.pause(), true)
  assert.equal(await sandbox.pause(), false)
  assert.equal((await sandbox.getInfo()).state, 'paused')
  const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 300_000 })
  assert.ok((await again.commands.list()).some(({ pid }) => pid === handle.pid))
  await sandbox.pause()
  await sandbox.connect({ onResume: 'reboot', timeoutMs: 300_000 })
  assert.deepEqual(await sandbox.commands.list(), [])
  await sandbox.commands.run('sleep 4242', { background: true, timeoutMs: 0 })
  await sandbox.pause({ keepMemory: false })
  await sandbox.connect({ timeoutMs: 300_000 })
  assert.deepEqual(await sandbox.commands.list(), [])
  assert.equal(await sandbox.files.read('kept'), 'here')
})

test('forks and sandboxes from a snapshot go on from one moment, each with its own id', async () => {
  await sandbox.files.write('moment', 'one')
  const forks = await sandbox.fork({ count: 2, timeoutMs: 120_000 })
  const name = `js-${randomUUID()}`
  const snapshot = await sandbox.createSnapshot({ name })
  await sandbox.files.write('moment', 'later')
  const started = await Sandbox.create(snapshot.snapshotId, { timeoutMs: 120_000, metadata: { mark } })
  for (const copy of [...forks, started]) {
    assert.ok(copy instanceof Sandbox, String(copy))
    assert.equal(await copy.files.read('moment'), 'one')
    assert.equal((await copy.commands.run('hostname')).stdout.trim(), copy.sandboxId)
  }
  assert.equal(new Set([sandbox, started, ...forks].map(({ sandboxId }) => sandboxId)).size, 4)
  const listed = await all(sandbox.listSnapshots())
  assert.deepEqual(listed.map(({ snapshotId }) => snapshotId), [snapshot.snapshotId])
  assert.deepEqual(listed[0].names, snapshot.names)
  assert.equal((await all(Sandbox.listSnapshots({ name }))).length, 1)
  await started.kill()
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
  await Promise.all(forks.map((fork) => fork.kill()))
})

test('lists are filtered by state, template and start, ordered, and come in pages', async () => {
  const before = new Date(Date.now() - 1)
  const two = [await Sandbox.create({ metadata: { mark, of: 'two' } }), await Sandbox.create({ metadata: { mark, of: 'two' } })]
  const query = { metadata: { mark, of: 'two' } }
  const ids = (items) => items.map(({ sandboxId }) => sandboxId)
  const upwards = await all(Sandbox.list({ query, order: 'asc', limit: 1 }))
  assert.deepEqual(ids(upwards), ids(two))
  assert.deepEqual(ids(await all(Sandbox.list({ query, order: 'desc' }))), ids(two).reverse())
  assert.equal((await all(Sandbox.list({ query: { ...query, startedAfter: before } }))).length, 2)
  assert.equal((await all(Sandbox.list({ query: { ...query, startedAfter: new Date(Date.now() + 60_000) } }))).length, 0)
  assert.equal((await all(Sandbox.list({ query: { ...query, template: 'base' } }))).length, 2)
  assert.equal((await all(Sandbox.list({ query: { ...query, template: 'no-such-template' } }))).length, 0)
  await two[0].pause()
  assert.deepEqual(ids(await all(Sandbox.list({ query: { ...query, state: ['paused'] } }))), [two[0].sandboxId])
  await Promise.all(two.map((each) => each.kill()))
})

test('a time is set, and one that is beyond the limit is refused with it', async () => {
  await sandbox.setTimeout(600_000)
  const { endAt } = await sandbox.getInfo()
  assert.ok(Math.abs(endAt - Date.now() - 600_000) < 10_000, `ends at ${endAt}`)
  await assert.rejects(sandbox.setTimeout(90_000_000), /86400 seconds, not 90000/)
})

test('a client that comes later goes on reading a command, a terminal is resized and connected to', async () => {
  const first = await sandbox.commands.run('echo one; read line; echo "two $line"; exit 3', { background: true, stdin: true, timeoutMs: 0 })
  await until(() => first.stdout === 'one\n')
  await first.disconnect()
  const second = await sandbox.commands.connect(first.pid)
  await second.sendStdin('more')
  await second.closeStdin()
  await assert.rejects(second.wait(), (error) => error instanceof CommandExitError && error.exitCode === 3 && error.stdout === 'two more\n')

  const decoder = new TextDecoder()
  let seen = ''
  const onData = (data) => { seen += decoder.decode(data, { stream: true }) }
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData, timeoutMs: 0, cwd: '/tmp', envs: { SAID: 'by envs' } })
  await terminal.disconnect()
  const again = await sandbox.pty.connect(terminal.pid, { onData })
  await sandbox.pty.resize(terminal.pid, { cols: 132, rows: 43 })
  await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('stty size; echo "$SAID in $PWD"; exit\n'))
  await again.wait()
  assert.match(seen, /43 132/)
  assert.match(seen, /by envs in \/tmp/)
  assert.equal(await sandbox.pty.kill(terminal.pid), false)
})

test('files are streamed both ways, written many at once, and keep metadata', async () => {
  const bytes = new Uint8Array(5_000_000).map((_, index) => index % 253)
  await sandbox.files.write('big', new Blob([bytes]).stream(), { gzip: true })
  let length = 0
  for await (const chunk of await sandbox.files.read('big', { format: 'stream' })) length += chunk.length
  assert.equal(length, bytes.length)
  await sandbox.files.write([{ path: 'many/a', data: 'a' }, { path: 'many/b', data: new Blob(['b']) }], { metadata: { by: 'js' } })
  assert.equal(await (await sandbox.files.read('many/b', { format: 'blob' })).text(), 'b')
  const info = await sandbox.files.getInfo('many/a')
  assert.deepEqual([info.type, info.size, info.owner, info.permissions, info.metadata], ['file', 1, 'user', '-rw-r--r--', { by: 'js' }])
  assert.deepEqual((await sandbox.files.list('many', { depth: 2 })).map(({ name }) => name), ['a', 'b'])

  const form = new FormData()
  form.append('file', new Blob(['by URL']), 'uploaded')
  const answer = await fetch(await sandbox.uploadUrl('uploaded', { useSignatureExpiration: 60 }), { method: 'POST', body: form })
  assert.equal(answer.status, 200)
  assert.equal(await sandbox.files.read('uploaded'), 'by URL')
})

test('a folder is watched with what is below it, and events carry their entries', async () => {
  await sandbox.files.makeDir('deep/er')
  const events = []
  const handle = await sandbox.files.watchDir('deep', (event) => { events.push(event) }, { recursive: true, includeEntry: true, timeoutMs: 0 })
  await sandbox.files.write('deep/er/file', 'text')
  await until(() => events.some(({ type, entry }) => type === 'write' && entry?.size === 4))
  const written = events.findLast(({ type }) => type === 'write')
  assert.deepEqual([written.name, written.entry.path], ['er/file', '/home/user/deep/er/file'])
  await handle.stop()
})

test('an upload to a sandbox that is gone says so, whatever its size and wherever it is refused', async () => {
  const gone = await Sandbox.create({ timeoutMs: 60_000, metadata: { mark } })
  await gone.kill()
  for (const size of [1, 1_000_000, 20_000_000]) {
    const data = 'x'.repeat(size)
    await assert.rejects(gone.files.write('file', data), TimeoutError, `${size} bytes to a sandbox that is gone`)
    await assert.rejects(sandbox.files.write('file', data, { user: 'nobody-here' }), /invalid username: 'nobody-here'/, `${size} bytes for a user who is not there`)
  }
})

test('secrets are made, listed, updated and destroyed, and their values never told', async () => {
  const name = `js-${randomUUID()}`
  const made = await Secret.create(name, 'the value', { metadata: { of: 'js' } })
  assert.deepEqual([made.name, made.version, made.metadata], [name, 1, { of: 'js' }])
  await assert.rejects(Secret.create(name, 'another'), SecretError)
  assert.equal((await Secret.update(name, 'newer')).version, 2)
  const found = (await all(Secret.list({ limit: 1 }))).find((secret) => secret.name === name)
  assert.ok(found && !JSON.stringify(found).includes('newer'))
  assert.ok((await Secret.getInfo(made.secretId)).updatedAt >= made.createdAt)
  assert.equal(await Secret.exists(name), true)
  assert.equal(await Secret.destroy(name), true)
  assert.equal(await Secret.destroy(name), false)
  await assert.rejects(Secret.update(name, 'x'), SecretNotFoundError)
})

test('the network is changed while it runs, and shown', async () => {
  const rules = { 'api.example.com': [{ transform: { headers: { Authorization: `Bearer ${Secret.fill('any')}` } } }] }
  await sandbox.updateNetwork({ allowOut: ({ rules }) => [...rules.keys()], denyOut: ({ allTraffic }) => [allTraffic], rules })
  const { network } = await sandbox.getInfo()
  assert.deepEqual([network.allowOut, network.denyOut], [['api.example.com'], ['0.0.0.0/0']])
  assert.deepEqual(Object.keys(network.rules['api.example.com'][0].transform.headers), ['Authorization'])
  await sandbox.updateNetwork({})
  assert.equal((await sandbox.getInfo()).network.allowOut, undefined)
})

test('what is not served is refused by name', async () => {
  const iam = { tokens: { aws: Secret.iamToken({ audience: 'sts.amazonaws.com', tokenType: 'JWT-SVID' }) } }
  await assert.rejects(Sandbox.create({ iam }), /iam\.tokens is set; this server issues no workload identities/)
  await assert.rejects(Sandbox.create({ mcp: { duckduckgo: {} } }), /mcp-gateway/)
})
