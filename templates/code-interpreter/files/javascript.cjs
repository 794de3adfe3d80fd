// The kernel of JavaScript and TypeScript: runs cells one after the other in one global scope. Requests come on stdin,
// events go to the FIFO that the last argument names; agent/src/interpreter/lines.rs tells the wire.
//
// A cell is a script, with what notebooks expect on top: `const`, `let` and classes may be declared again by a later
// cell, `import` and `await` stand at the top level, and the last expression is the cell's value.
'use strict';

const childProcess = require('child_process');
const crypto = require('crypto');
const fs = require('fs');
const { createRequire } = require('module');
const path = require('path');
const readline = require('readline');
const util = require('util');
const vm = require('vm');
const acorn = require('acorn');

const isTypeScript = process.argv.includes('--typescript');
const events = fs.openSync(process.argv.at(-1), 'w');
let cellCount = 0;
let interruptCell = null;

function tell(verb, ...words) {
  const line = [verb, ...words.map((word) => Buffer.from(String(word)).toString('base64'))].join(' ') + '\n';
  for (let rest = Buffer.from(line); rest.length > 0; ) rest = rest.subarray(fs.writeSync(events, rest));
}

// ---------------------------------------------------------------- from a cell to a script

/** Whether there is an `await` that belongs to no function inside the cell. */
function awaits(node) {
  if (node === null || typeof node !== 'object') return false;
  if (Array.isArray(node)) return node.some(awaits);
  if (node.type === 'AwaitExpression' || (node.type === 'ForOfStatement' && node.await)) return true;
  if (/Function/.test(node.type) || node.type === 'StaticBlock' || node.type === 'PropertyDefinition') return false;
  return Object.values(node).some(awaits);
}

/** Names that a pattern binds. */
function namesOf(pattern) {
  switch (pattern?.type) {
    case 'Identifier': return [pattern.name];
    case 'ObjectPattern': return pattern.properties.flatMap((property) => namesOf(property.value ?? property.argument));
    case 'ArrayPattern': return pattern.elements.flatMap(namesOf);
    case 'AssignmentPattern': return namesOf(pattern.left);
    case 'RestElement': return namesOf(pattern.argument);
    default: return [];
  }
}

/** Replaces parts of `code`, given as [start, end, text] that do not overlap. */
function edited(code, edits) {
  const parts = [];
  let at = 0;
  for (const [start, end, text] of [...edits].sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    parts.push(code.slice(at, start), text);
    at = end;
  }
  return parts.join('') + code.slice(at);
}

/** `import` as what it binds, from a module that is awaited. */
function importAsAwait(node) {
  const source = node.source.raw;
  const names = [];
  const statements = [];
  for (const specifier of node.specifiers) {
    names.push(specifier.local.name);
    const imported = specifier.imported;
    const key = specifier.type === 'ImportDefaultSpecifier' ? 'default' : JSON.stringify(imported?.name ?? imported?.value);
    statements.push(
      specifier.type === 'ImportNamespaceSpecifier'
        ? `;${specifier.local.name} = await import(${source});`
        : `;({ ${key}: ${specifier.local.name} } = await import(${source}));`,
    );
  }
  return { names, text: statements.join(' ') || `;await import(${source});` };
}

/** The cell as a script of its own lines; `isAsync` says that its value is a promise of the cell's. */
function scriptOf(code) {
  const options = { ecmaVersion: 'latest', sourceType: 'script', allowAwaitOutsideFunction: true, allowImportExportEverywhere: true, allowHashBang: true };
  const body = acorn.parse(code, options).body;
  const isAsync = body.some((node) => node.type === 'ImportDeclaration' || awaits(node));
  const edits = [];
  const names = new Set();
  const functions = [];
  for (const outer of body) {
    const isExport = outer.type === 'ExportNamedDeclaration' || outer.type === 'ExportDefaultDeclaration';
    const node = (isExport && outer.declaration) || outer;
    if (isExport && node !== outer) edits.push([outer.start, node.start, '']);
    if (node.type === 'ImportDeclaration') {
      const { names: bound, text } = importAsAwait(node);
      bound.forEach((name) => names.add(name));
      edits.push([node.start, node.end, text]);
    } else if (node.type === 'ClassDeclaration' && node.id) {
      names.add(node.id.name);
      edits.push([node.start, node.start, `;${node.id.name} = `], [node.end, node.end, ';']);
    } else if (node.type === 'FunctionDeclaration' && node.id && isAsync) {
      functions.push(node.id.name);
    } else if (node.type === 'VariableDeclaration' && isAsync) {
      node.declarations.flatMap((declaration) => namesOf(declaration.id)).forEach((name) => names.add(name));
      edits.push([node.start, node.declarations[0].start, ';']);
      node.declarations.forEach((declaration) => {
        const suffix = declaration.init ? ')' : node.kind === 'var' ? ')' : ' = undefined)';
        edits.push([declaration.start, declaration.start, '('], [declaration.end, declaration.end, suffix]);
      });
      edits.push([node.end, node.end, ';']);
    } else if (node.type === 'VariableDeclaration' && node.kind !== 'var') {
      edits.push([node.start, node.start + node.kind.length, 'var']);
    }
  }
  const last = body.at(-1);
  if (isAsync && last?.type === 'ExpressionStatement') {
    edits.push([last.start, last.expression.start, ';return ('], [last.expression.end, last.end, ');']);
  }
  const declared = names.size > 0 ? `var ${[...names].join(', ')}; ` : '';
  const hoisted = functions.map((name) => `globalThis.${name} = ${name}; `).join('');
  const text = edited(code, edits);
  return { isAsync, text: isAsync ? `${declared}(async () => { ${hoisted}${text}\n})()` : declared + text };
}

function withoutTypes(code) {
  const settings = JSON.stringify({ compilerOptions: { verbatimModuleSyntax: true, experimentalDecorators: true } });
  const run = childProcess.spawnSync('esbuild', ['--loader=ts', '--target=esnext', '--log-level=error', '--color=false', `--tsconfig-raw=${settings}`], { input: code, encoding: 'utf8' });
  if (run.error) throw run.error;
  if (run.status !== 0) throw new SyntaxError(run.stderr.trim());
  return run.stdout;
}

// ---------------------------------------------------------------- values

/** A value in all its forms: text, and what it has methods for (those of ijavascript). */
function formsOf(value) {
  const forms = ['text/plain', typeof value === 'object' && value !== null && typeof value._toText === 'function' ? value._toText() : util.inspect(value)];
  if ((typeof value !== 'object' && typeof value !== 'function') || value === null) return forms;
  if (typeof value._toMime === 'function') Object.entries(value._toMime()).forEach(([type, form]) => forms.push(type, typeof form === 'string' ? form : JSON.stringify(form)));
  for (const [method, type] of [['_toHtml', 'text/html'], ['_toSvg', 'image/svg+xml'], ['_toPng', 'image/png'], ['_toJpeg', 'image/jpeg'], ['_toMarkdown', 'text/markdown'], ['_toLatex', 'text/latex']]) {
    if (typeof value[method] === 'function') forms.push(type, value[method]());
  }
  return forms;
}

function tellError(error) {
  if (error === null || typeof error !== 'object' || !('message' in error)) return tell('error', 'Error', util.inspect(error), util.inspect(error));
  const own = (line) => /^\s+at /.test(line) && [__filename, 'node:', '/acorn/'].some((place) => line.includes(place));
  const stack = String(error.stack ?? error).split('\n').filter((line) => !own(line)).join('\n');
  tell('error', error.name ?? 'Error', error.message, stack);
}

// ---------------------------------------------------------------- running

async function run(code) {
  cellCount += 1;
  const filename = path.join(process.cwd(), `cell-${cellCount}.js`);
  const interrupted = new Promise((_, reject) => {
    interruptCell = () => reject(Object.assign(new Error('the cell was interrupted'), { name: 'InterruptedError' }));
  });
  // Without a handler a rejection after the end of the cell would end the process.
  interrupted.catch(() => {});
  try {
    const { isAsync, text } = scriptOf(isTypeScript ? withoutTypes(code) : code);
    const script = new vm.Script(text, { filename, importModuleDynamically: vm.constants.USE_MAIN_CONTEXT_DEFAULT_LOADER });
    const result = script.runInThisContext({ breakOnSigint: true });
    const value = isAsync ? await Promise.race([result, interrupted]) : result;
    if (value !== undefined) tell('result', ...formsOf(value));
  } catch (error) {
    tellError(error);
  }
  interruptCell = null;
  tell('done');
}

/** The sandbox has become another one: what this process would draw next, its twin draws too. */
function reseed() {
  // Not from OpenSSL's generator, which is the twin's as well.
  const seed = Buffer.alloc(16);
  const source = fs.openSync('/dev/urandom', 'r');
  fs.readSync(source, seed);
  fs.closeSync(source);
  let [a, b, c, d] = [0, 4, 8, 12].map((at) => seed.readInt32LE(at));
  const next = () => {
    // sfc32: 128 bits of state, as many as V8's own generator has.
    const sum = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (c << 21) | (c >>> 11);
    c = (c + sum) | 0;
    return sum >>> 0;
  };
  Math.random = () => ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992;
  const { randomUUID } = crypto;
  crypto.randomUUID = (options) => randomUUID.call(crypto, { ...options, disableEntropyCache: true });
}

for (const [stream, verb] of [[process.stdout, 'out'], [process.stderr, 'err']]) {
  stream.write = (chunk, encoding, callback) => {
    tell(verb, typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString());
    const done = typeof encoding === 'function' ? encoding : callback;
    if (done) process.nextTick(done);
    return true;
  };
}
process.on('SIGINT', () => interruptCell?.());
process.on('uncaughtException', (error) => process.stderr.write(`Uncaught ${util.inspect(error)}\n`));
Object.assign(globalThis, { require: createRequire(path.join(process.cwd(), 'cell.js')), display: (value) => tell('display', ...formsOf(value)) });
process.argv.splice(1);

const decode = (word) => Buffer.from(word, 'base64').toString();
let queue = Promise.resolve();
readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const [verb, ...words] = line.split(' ');
  if (verb === 'run') queue = queue.then(() => run(decode(words[0])));
  else if (verb === 'set') process.env[decode(words[0])] = decode(words[1]);
  else if (verb === 'unset') delete process.env[decode(words[0])];
  else if (verb === 'reseed') reseed();
});
tell('ready');
