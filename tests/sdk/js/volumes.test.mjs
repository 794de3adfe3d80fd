// Volumes by the unmodified JavaScript SDK: made, read and written without a sandbox, shared by several.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { after, before, test } from 'node:test'
import { Sandbox, Volume, VolumeError, VolumeNotFoundError, VolumePathNotFoundError } from 'e2b'

let volume
before(async () => {
  volume = await Volume.create(`js-${randomUUID()}`)
})
after(async () => {
  await Volume.destroy(volume.volumeId)
})

test('a volume is made, found, connected to by its id and destroyed once', async () => {
  const name = `js-${randomUUID()}`
  const made = await Volume.create(name)
  assert.equal(made.name, name)
  assert.ok((await Volume.list()).some((listed) => listed.volumeId === made.volumeId && listed.name === name))
  assert.equal((await Volume.getInfo(made.volumeId)).name, name)
  await made.writeFile('/note', 'kept')
  assert.equal(await (await Volume.connect(made.volumeId)).readFile('/note'), 'kept')
  assert.equal(await Volume.destroy(made.volumeId), true)
  assert.equal(await Volume.destroy(made.volumeId), false)
  await assert.rejects(Volume.connect(made.volumeId), VolumeNotFoundError)
})

test('a name that is taken or not a name is refused with the reason', async () => {
  await assert.rejects(Volume.create(volume.name), (error) => error instanceof VolumeError && error.message.includes(volume.name))
  await assert.rejects(Volume.create('no name'), (error) => error instanceof VolumeError && error.message.includes('no name'))
})

test('text, bytes, blobs and streams go in and come out, whatever their size', async () => {
  await volume.writeFile('/text', 'grüß dich')
  assert.equal(await volume.readFile('/text'), 'grüß dich')
  const bytes = new Uint8Array(3_000_000).map((_, index) => index % 251)
  await volume.writeFile('/bytes', bytes.buffer)
  assert.deepEqual(await volume.readFile('/bytes', { format: 'bytes' }), bytes)
  await volume.writeFile('/blob', new Blob([bytes]))
  assert.deepEqual(new Uint8Array(await (await volume.readFile('/blob', { format: 'blob' })).arrayBuffer()), bytes)
  await volume.writeFile('/stream', new Blob([bytes]).stream())
  let length = 0
  for await (const chunk of await volume.readFile('/stream', { format: 'stream' })) length += chunk.length
  assert.equal(length, bytes.length)
})

test('folders are made, listed to a depth, described, changed and removed', async () => {
  await volume.makeDir('/a/b/c', { force: true })
  await volume.writeFile('/a/b/file', 'x', { uid: 1000, gid: 1000, mode: 0o640 })
  assert.deepEqual((await volume.list('/a')).map((entry) => entry.path), ['/a/b'])
  assert.deepEqual((await volume.list('/a', { depth: 2 })).map((entry) => entry.path).sort(), ['/a/b', '/a/b/c', '/a/b/file'])
  const file = await volume.getInfo('/a/b/file')
  assert.deepEqual([file.name, file.type, file.size, file.uid, file.gid, file.mode & 0o777], ['file', 'file', 1, 1000, 1000, 0o640])
  assert.ok(Math.abs(file.mtime - Date.now()) < 60_000, `mtime is ${file.mtime}`)
  assert.equal((await volume.updateMetadata('/a/b/file', { mode: 0o600 })).mode & 0o777, 0o600)
  await volume.remove('/a')
  assert.equal(await volume.exists('/a/b/file'), false)
  await assert.rejects(volume.readFile('/a/b/file'), VolumePathNotFoundError)
  await assert.rejects(volume.list('/a'), VolumePathNotFoundError)
})

test('sandboxes share it at once, by object and by name, and it outlives them', async () => {
  const writer = await Sandbox.create({ timeoutMs: 120_000, volumeMounts: { '/mnt/data': volume } })
  const reader = await Sandbox.create({ timeoutMs: 120_000, volumeMounts: { '/srv/data': volume.name } })
  try {
    await writer.files.write('/mnt/data/shared', 'by the writer')
    assert.equal(await reader.files.read('/srv/data/shared'), 'by the writer')
    assert.deepEqual((await reader.getInfo()).volumeMounts, [{ name: volume.name, path: '/srv/data' }])
    await assert.rejects(Volume.destroy(volume.volumeId), /is mounted in sandbox/)
  } finally {
    await Promise.all([writer.kill(), reader.kill()])
  }
  assert.equal(await volume.readFile('/shared'), 'by the writer')
})

test('a volume that is not there is refused by name', async () => {
  await assert.rejects(Sandbox.create({ volumeMounts: { '/mnt/data': 'no-such-volume' } }), /no-such-volume/)
})
