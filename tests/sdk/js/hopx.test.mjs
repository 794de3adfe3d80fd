// HopX's unmodified JavaScript SDK against the server that the runner started (its environment is in process.env).
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { DesktopNotAvailableError, FileNotFoundError, Sandbox, SandboxExpiredError } from '@hopx-ai/sdk'

const access = { apiKey: process.env.E2B_API_KEY, baseURL: process.env.E2B_API_URL.replace('localhost', '127.0.0.1') }
let sandbox
before(async () => {
  sandbox = await Sandbox.create({ template: 'base', timeoutSeconds: 300, envVars: { GREETING: 'hello' }, ...access })
})
after(async () => {
  await sandbox?.kill()
})

test('commands, files and variables', async () => {
  const result = await sandbox.commands.run('echo $GREETING $B; exit 3', { env: { B: '2' } })
  assert.deepEqual([result.stdout, result.exit_code], ['hello 2\n', 3])
  await sandbox.files.write('/workspace/js.txt', 'text ü')
  assert.equal(await sandbox.files.read('/workspace/js.txt'), 'text ü')
  const [entry] = (await sandbox.files.list('/workspace')).filter((file) => file.name === 'js.txt')
  assert.ok(!entry.is_dir && entry.size === 7)
  await assert.rejects(sandbox.files.read('/workspace/none'), FileNotFoundError)
  await sandbox.env.set('LATER', 'yes')
  assert.equal((await sandbox.env.getAll()).LATER, 'yes')
})

test('code runs in several languages and in the background', async () => {
  assert.equal((await sandbox.runCode('console.log(6 * 7)', { language: 'javascript' })).stdout, '42\n')
  assert.equal((await sandbox.runIpython('print(6 * 7)')).stdout, '42\n')
  const job = await sandbox.runCodeBackground('import time; time.sleep(1000)', { name: 'sleeper' })
  await sandbox.killProcess(job.process_id)
  const [killed] = (await sandbox.listProcesses()).filter((process) => process.process_id === job.process_id)
  assert.deepEqual([killed.name, killed.status], ['sleeper', 'killed'])
})

test('output is streamed', async () => {
  const types = []
  for await (const message of sandbox.runCodeStream('print("streamed")')) types.push(message.type)
  assert.deepEqual([types[0], ...types.slice(-2)], ['stdout', 'result', 'complete'])
})

test('a paused sandbox is resumed by connect, and one that is gone is called so', async () => {
  const other = await Sandbox.create({ template: 'base', timeoutSeconds: 60, ...access })
  await other.files.write('/workspace/kept', 'yes')
  await other.pause()
  assert.equal((await other.getInfo()).status, 'paused')
  const again = await Sandbox.connect(other.sandboxId, access.apiKey, access.baseURL)
  assert.equal(await again.files.read('/workspace/kept'), 'yes')
  await again.kill()
  await assert.rejects(again.getInfo(), SandboxExpiredError)
})

test('there is no desktop', async () => {
  await assert.rejects(sandbox.desktop.screenshot(), DesktopNotAvailableError)
})
