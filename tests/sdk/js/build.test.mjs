// Template builds by the unmodified JavaScript SDK.
import assert from 'node:assert/strict'
import { mkdtempSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { randomUUID } from 'node:crypto'
import { BuildError, Sandbox, Template, waitForFile } from 'e2b'

const size = { cpuCount: 1, memoryMB: 512 }

test('a template is built, tagged, and its sandboxes find what its steps left and started', async () => {
  const context = mkdtempSync(join(tmpdir(), 'stillbox-js-'))
  mkdirSync(join(context, 'folder'))
  writeFileSync(join(context, 'folder', 'file'), 'copied')
  symlinkSync('file', join(context, 'folder', 'link'))
  const name = `js-${randomUUID()}`
  const template = Template({ fileContextPath: context })
    .fromTemplate('base')
    .copy('folder/*', 'here')
    .runCmd('cat here/link > made')
    .setEnvs({ FROM: 'js' })
    .setWorkdir('/srv/js')
    .setStartCmd('touch /tmp/up; exec sleep 4242', waitForFile('/tmp/up'))
  const lines = []
  const built = await Template.build(template, `${name}:v1`, { ...size, onBuildLogs: (entry) => lines.push(entry.message) })
  assert.ok(lines.some((line) => line.includes('[builder 2/4] RUN cat here/link > made')), lines.join('\n'))
  assert.equal(await Template.exists(name), true)
  await Template.assignTags(`${name}:v1`, ['default'])
  assert.deepEqual((await Template.getTags(name)).map((tag) => [tag.tag, tag.buildId]).sort(), [
    ['default', built.buildId],
    ['v1', built.buildId],
  ])
  const sandbox = await Sandbox.create(name, { timeoutMs: 60_000 })
  try {
    const found = await sandbox.commands.run('cat ~/made; echo; echo $FROM; pwd; pgrep -xc sleep')
    assert.equal(found.stdout, 'copied\njs\n/srv/js\n1\n')
  } finally {
    await sandbox.kill()
  }
  await Template.removeTags(name, 'v1')
  assert.deepEqual((await Template.getTags(name)).map((tag) => tag.tag), ['default'])
})

test('a step that fails is an error that names it and the line that wrote it', async () => {
  const template = Template().fromTemplate('base').runCmd('true').runCmd('exit 5')
  await assert.rejects(Template.build(template, `js-${randomUUID()}`, size), (error) => {
    assert.ok(error instanceof BuildError)
    assert.match(error.message, /failed to run command 'exit 5': exit status 5/)
    assert.match(error.stack, /build\.test\.mjs/)
    return true
  })
})

test('a build in the background is building at once', async () => {
  const name = `js-${randomUUID()}`
  const info = await Template.buildInBackground(Template().fromTemplate('base').runCmd(`sleep 1; : ${name}`), name, size)
  assert.equal((await Template.getBuildStatus(info)).status, 'building')
  let status
  do {
    await new Promise((resolve) => setTimeout(resolve, 100))
    status = (await Template.getBuildStatus(info)).status
  } while (status === 'building')
  assert.equal(status, 'ready')
})
