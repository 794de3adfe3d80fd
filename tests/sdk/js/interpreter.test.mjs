// The unmodified @e2b/code-interpreter against the server that the runner started.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { Sandbox } from '@e2b/code-interpreter'

let sandbox
before(async () => {
  sandbox = await Sandbox.create({ timeoutMs: 300_000, envs: { WHO: 'js' } })
})
after(async () => {
  await sandbox?.kill()
})

test('cells of each language share what they made', async () => {
  for (const [language, first, second] of [
    ['python', 'x = 40', 'x + 2'],
    ['js', 'const x = 40', 'x + 2'],
    ['ts', 'const y: number = 40', 'y + 2'],
  ]) {
    await sandbox.runCode(first, { language })
    assert.equal((await sandbox.runCode(second, { language })).text, '42', language)
  }
  await sandbox.runCode('x=40', { language: 'bash' })
  assert.deepEqual((await sandbox.runCode('echo $((x + 2)) $WHO', { language: 'bash' })).logs.stdout, ['42 js\n'])
})

test('outputs come as they are made', async () => {
  const seen = []
  const execution = await sandbox.runCode('import time\nprint(1, flush=True); time.sleep(0.5); print(2); 1/0', {
    onStdout: (message) => seen.push(message.line),
    onError: (error) => seen.push(error.name),
  })
  assert.deepEqual(seen, ['1\n', '2\n', 'ZeroDivisionError'])
  assert.equal(execution.error.value, 'division by zero')
})

test('a figure brings its image and its chart', async () => {
  const { results } = await sandbox.runCode('import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4], label="l"); plt.title("T"); plt.show()')
  assert.ok(results[0].png)
  assert.equal(results[0].chart.type, 'line')
  assert.equal(results[0].chart.title, 'T')
  assert.deepEqual(results[0].extra, {})
})

test('contexts are apart, and a client that gives up interrupts its cell', async () => {
  const context = await sandbox.createCodeContext({ language: 'python', cwd: '/tmp' })
  assert.equal((await sandbox.listCodeContexts()).at(-1).id, context.id)
  await sandbox.runCode('kept = 0', { context })
  await assert.rejects(sandbox.runCode('kept = 1\nwhile True: pass', { context, timeoutMs: 700 }))
  assert.equal((await sandbox.runCode('kept, __import__("os").getcwd()', { context, timeoutMs: 10_000 })).text, "(1, '/tmp')")
  await sandbox.removeCodeContext(context)
  assert.ok(!(await sandbox.listCodeContexts()).some((listed) => listed.id === context.id))
})
