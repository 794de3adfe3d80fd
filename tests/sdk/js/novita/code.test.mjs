// The code interpreter of Novita's JavaScript SDK, 1.0.1 and 2.1.1, on the server's own template.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { Sandbox } from 'novita-sandbox/code-interpreter'

let sandbox
before(async () => {
  sandbox = await Sandbox.create({ timeoutMs: 300_000, envs: { WHOSE: 'sandbox' } })
})
after(async () => {
  await sandbox?.kill()
})

test('cells have values, output, errors and state', async () => {
  const execution = await sandbox.runCode('import sys; kept = 41; print("out"); print("err", file=sys.stderr); kept + 1')
  assert.deepEqual([execution.text, execution.logs.stdout, execution.logs.stderr], ['42', ['out\n'], ['err\n']])
  const failed = await sandbox.runCode('1 / 0')
  assert.deepEqual([failed.error.name, failed.error.value], ['ZeroDivisionError', 'division by zero'])
  assert.equal((await sandbox.runCode('kept')).text, '41')
})

test('callbacks are called as output is made', async () => {
  const seen = []
  await sandbox.runCode('import sys\nprint("out"); print("err", file=sys.stderr); display("shown"); 1 / 0', {
    onStdout: (message) => seen.push(message.line),
    onStderr: (message) => seen.push(message.line),
    onResult: (result) => seen.push(result.text),
    onError: (error) => seen.push(error.name),
  })
  assert.deepEqual(seen.toSorted(), ['ZeroDivisionError', 'err\n', 'out\n', 'shown'])
})

test("a run's variables come first and are gone after it (22)", async () => {
  const code = 'console.log(process.env.WHOSE, process.env.RUNS ?? "none")'
  const printed = async (envs) => (await sandbox.runCode(code, { language: 'js', envs })).logs.stdout.join('')
  assert.equal(await printed(), 'sandbox none\n')
  assert.equal(await printed({ WHOSE: 'run', RUNS: 'own' }), 'run own\n')
  assert.equal(await printed(), 'sandbox none\n')
})

test('contexts have folders and variables of their own', async () => {
  const context = await sandbox.createCodeContext({ cwd: '/tmp', language: 'python' })
  assert.equal((await sandbox.runCode('import os; apart = 1; os.getcwd()', { context })).text, '/tmp')
  assert.equal((await sandbox.runCode("'apart' in globals()")).text, 'False')
})

test('variables survive a pause (7, 10)', async () => {
  await sandbox.runCode('kept = "over the pause"')
  await (sandbox.pause ? sandbox.pause() : sandbox.betaPause())
  const again = await Sandbox.connect(sandbox.sandboxId)
  assert.equal((await again.runCode('kept')).text, 'over the pause')
})
