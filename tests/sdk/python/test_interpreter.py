"""The code interpreter, by the unmodified e2b-code-interpreter against the server's own template."""

import threading
import time
import urllib.error
import urllib.request

import pytest
from e2b import InvalidArgumentException, NotFoundException, SandboxException, TimeoutException
from e2b_code_interpreter import Sandbox


@pytest.fixture(scope="module")
def interpreter(server):
    """One sandbox for the tests that leave nothing behind which others would stumble over."""
    sandbox = Sandbox.create(timeout=600, envs={"OF_THE_SANDBOX": "it's \"own\""})
    yield sandbox
    sandbox.kill()


def printed(execution):
    assert execution.error is None, execution.error
    return "".join(execution.logs.stdout)


def wait_for(what, condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


# ---------------------------------------------------------------- cells


def test_a_value_a_print_and_an_error_come_back_in_their_places(interpreter):
    execution = interpreter.run_code("import sys; print('out'); print('err', file=sys.stderr); 40 + 2")
    assert (execution.text, execution.logs.stdout, execution.logs.stderr) == ("42", ["out\n"], ["err\n"])
    failed = interpreter.run_code("def f():\n    return 1 / 0\nf()")
    assert (failed.error.name, failed.error.value) == ("ZeroDivisionError", "division by zero")
    assert "----> 2     return 1 / 0" in failed.error.traceback and "\x1b" not in failed.error.traceback


def test_state_stays_between_cells_and_cells_are_counted(server):
    with Sandbox.create() as sandbox:
        assert sandbox.run_code("x = 1").execution_count == 1
        second = sandbox.run_code("x += 1; x")
        assert (second.text, second.execution_count) == ("2", 2)


def test_output_is_streamed_while_the_cell_runs(interpreter):
    seen = []
    begun = time.monotonic()
    interpreter.run_code("import time\nprint('first', flush=True); time.sleep(1); print('second')", on_stdout=lambda out: seen.append((out.line, time.monotonic() - begun)))
    assert [line for line, _ in seen] == ["first\n", "second\n"]
    assert seen[0][1] < 0.9 < seen[1][1], seen


def test_much_output_comes_whole_and_in_order(interpreter):
    execution = interpreter.run_code("for i in range(20000): print(i, 'ü' * 20)")
    assert printed(execution) == "".join(f"{i} {'ü' * 20}\n" for i in range(20000))
    large = interpreter.run_code("print('x' * 3_000_000)")
    assert len(printed(large)) == 3_000_001


def test_every_form_of_a_value_has_its_field(interpreter):
    code = """
    from IPython.display import HTML, JSON, Javascript, Latex, Markdown, SVG, display
    for shown in (HTML('<b>h</b>'), Markdown('*m*'), Latex('$l$'), SVG('<svg xmlns="http://www.w3.org/2000/svg"/>'), JSON({'j': 1}), Javascript('1')):
        display(shown)
    display({'application/pdf': 'cGRm', 'x-own/type': 'mine'}, raw=True)
    """
    html, markdown, latex, svg, as_json, javascript, raw = interpreter.run_code(code).results
    assert (html.html, markdown.markdown, latex.latex) == ("<b>h</b>", "*m*", "$l$")
    assert svg.svg.startswith("<svg") and as_json.json == {"j": 1} and javascript.javascript == "1"
    assert raw.pdf == "cGRm" and raw.extra == {"x-own/type": "mine"}
    listed = interpreter.run_code("[1, {'a': [True, None]}]").results[0]
    assert listed.is_main_result and listed.json == [1, {"a": [True, None]}]


def test_a_frame_brings_its_data_and_a_figure_its_image_and_chart(interpreter):
    frame = interpreter.run_code("import pandas as pd\npd.DataFrame({'a': [1, 2], 'when': pd.to_datetime(['2024-01-02', '2024-01-03'])})").results[0]
    assert frame.data == {"a": [1, 2], "when": ["2024-01-02T00:00:00", "2024-01-03T00:00:00"]}
    assert "<table" in frame.html
    code = """
    import matplotlib.pyplot as plt
    plt.bar(['one', 'two'], [3, 5]); plt.title('Bars'); plt.ylabel('Height (m)')
    plt.show()
    """
    figure = interpreter.run_code(code).results[0]
    assert figure.png and figure.text.startswith("<Figure size") and not figure.extra
    assert (figure.chart.type.value, figure.chart.title, figure.chart.y_unit) == ("bar", "Bars", "m")
    assert [(bar.label, bar.value) for bar in figure.chart.elements] == [("one", 3), ("two", 5)]


def test_an_image_is_shown_when_it_is_shown_or_saved(interpreter):
    shown = interpreter.run_code("from PIL import Image\nimage = Image.new('RGB', (4, 4))\nimage.show(); image.save('/tmp/image.png')")
    assert len(shown.results) == 2 and all(result.png for result in shown.results)


def test_a_cell_runs_where_and_as_whom_e2bs_do(interpreter):
    assert interpreter.run_code("import os; (os.getcwd(), os.getuid())").text == "('/home/user', 0)"
    assert printed(interpreter.run_code("!pwd")) in ("/home/user\r\n", "/home/user\n")


# ---------------------------------------------------------------- languages

# A value, how a variable called NAME is printed, a failure.
LANGUAGES = {
    "python": ("'a' + 'b'", "import os; print(os.environ.get('NAME', 'none'))", "raise ValueError('x')"),
    "javascript": ("'a' + 'b'", "console.log(process.env.NAME ?? 'none')", "throw new Error('x')"),
    "typescript": ("const s: string = 'a'; s + 'b'", "console.log(process.env.NAME ?? 'none')", "throw new Error('x' as string)"),
    "bash": ("echo -n ab", 'echo "${NAME:-none}"', "false"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_has_values_variables_and_errors(interpreter, language):
    value, variable, fails = LANGUAGES[language]
    execution = interpreter.run_code(value, language=language)
    assert (execution.text or printed(execution)) == "ab"

    def variable_is(name, **more):
        return printed(interpreter.run_code(variable.replace("NAME", name), language=language, **more)).removesuffix("\n")

    odd = "ü 'q' \"d\" \\ $HOME \n{}"
    assert variable_is("OF_THE_SANDBOX") == "it's \"own\""
    assert variable_is("OF_THE_CALL", envs={"OF_THE_CALL": odd}) == odd
    assert variable_is("OF_THE_SANDBOX", envs={"OF_THE_SANDBOX": "other"}) == "other"
    # Afterwards the one is gone and the other back.
    assert variable_is("OF_THE_CALL") == "none"
    assert variable_is("OF_THE_SANDBOX") == "it's \"own\""
    assert interpreter.run_code(fails, language=language).error is not None


def test_javascript_declares_again_imports_and_awaits(interpreter):
    run = lambda code: interpreter.run_code(code, language="js")  # noqa: E731
    assert run("const c = 1; class C { n() { return c } }; new C().n()").text == "1"
    assert run("const c = 2; new C().n()").text == "2"
    assert run("import fs, { readFileSync } from 'fs'\nimport * as os from 'node:os'\ntypeof readFileSync + typeof os.cpus + typeof fs.statSync").text == "function" * 3
    assert run("const { a, b: [d] } = await Promise.resolve({ a: 1, b: [2] })\nfunction sum() { return a + d }\nsum()").text == "3"
    assert run("sum() + a").text == "4"
    assert "SyntaxError" == run("let =").error.name


def test_bash_keeps_its_state_and_tells_the_exit_code(interpreter):
    run = lambda code: interpreter.run_code(code, language="bash")  # noqa: E731
    run("cd /tmp; f() { echo in f; }; declare -A map=([k]=v)")
    assert printed(run("pwd; f; echo ${map[k]}; cat")) == "/tmp\nin f\nv\n"
    failed = run("echo before; (exit 7)")
    assert failed.error.value == "7" and failed.logs.stdout == ["before\n"]
    run("cd /home/user")


def test_a_missing_language_says_which_template_has_it(interpreter):
    with pytest.raises(SandboxException, match="stillbox template build code-interpreter-r"):
        interpreter.run_code("1", language="r")
    with pytest.raises(SandboxException, match="'cobol' is not known here"):
        interpreter.create_code_context(language="cobol")


# ---------------------------------------------------------------- contexts


def test_contexts_are_made_listed_restarted_and_removed(interpreter):
    assert {"python", "javascript"} <= {context.language for context in interpreter.list_code_contexts()}
    context = interpreter.create_code_context(cwd="/tmp")
    assert interpreter.list_code_contexts()[-1].id == context.id
    assert interpreter.run_code("import os; x = 5; os.getcwd()", context=context).text == "/tmp"
    assert interpreter.run_code("'x' in globals()").text == "False"
    interpreter.restart_code_context(context.id)
    assert interpreter.run_code("x", context=context).error.name == "NameError"
    interpreter.remove_code_context(context.id)
    assert context.id not in [listed.id for listed in interpreter.list_code_contexts()]
    with pytest.raises(NotFoundException):
        interpreter.run_code("1", context=context)
    with pytest.raises(NotFoundException):
        interpreter.remove_code_context(context.id)
    with pytest.raises(SandboxException, match="/nowhere"):
        interpreter.create_code_context(cwd="/nowhere")


def test_a_context_and_a_language_are_one_too_many(interpreter):
    context = interpreter.create_code_context()
    with pytest.raises(InvalidArgumentException):
        interpreter.run_code("1", language="js", context=context)
    interpreter.remove_code_context(context.id)


def test_cells_of_one_context_wait_and_those_of_two_do_not(interpreter):
    other = interpreter.create_code_context()
    interpreter.run_code("1", context=other)
    ends = {}

    def run(name, **where):
        interpreter.run_code("import time; time.sleep(0.7)", **where)
        ends[name] = time.monotonic()

    begun = time.monotonic()
    threads = [threading.Thread(target=run, args=[name], kwargs=where) for name, where in (("a", {}), ("b", {}), ("c", {"context": other}))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(ends["a"], ends["b"]) - begun > 1.4 and ends["c"] - begun < 1.4, (begun, ends)
    interpreter.remove_code_context(other.id)


# ---------------------------------------------------------------- interrupts and deaths


@pytest.mark.parametrize(
    "language, code, after, value",
    [
        ("python", "import time; kept = 7; time.sleep(300)", "kept", "7"),
        ("python", "while True: pass", "1 + 1", "2"),
        ("javascript", "var kept = 7; while (true) {}", "kept", "7"),
        ("javascript", "await new Promise(() => {})", "1 + 1", "2"),
        ("bash", "kept=7; while :; do sleep 300; done", "printf $kept", "7"),
    ],
)
def test_a_client_that_gives_up_interrupts_its_cell_and_the_state_stays(interpreter, language, code, after, value):
    with pytest.raises(TimeoutException):
        interpreter.run_code(code, language=language, timeout=0.5)
    execution = interpreter.run_code(after, language=language, timeout=15)
    assert execution.text == value or printed(execution) == value


def test_a_dead_kernel_is_reported_and_the_next_cell_has_a_new_one(interpreter):
    context = interpreter.create_code_context()
    died = interpreter.run_code("import os; x = 1; os.kill(os.getpid(), 9)", context=context)
    assert died.error.name == "ContextRestarting" and "signal: killed" in died.error.value
    assert interpreter.run_code("x", context=context).error.name == "NameError"
    pid = interpreter.run_code("import os; os.getpid()", context=context).text
    interpreter.commands.run(f"kill -9 {pid}", user="root")
    assert interpreter.run_code("1 + 1", context=context, timeout=20).text == "2"
    interpreter.remove_code_context(context.id)


def test_a_cell_that_ends_its_kernel_at_once_has_run_once(interpreter):
    context = interpreter.create_code_context()
    for _ in range(6):
        code = "import os; f = os.open('/tmp/ran', os.O_CREAT | os.O_APPEND | os.O_WRONLY); os.write(f, b'x'); os.kill(os.getpid(), 9)"
        assert interpreter.run_code(code, context=context).error.name == "ContextRestarting"
    assert interpreter.files.read("/tmp/ran") == "x" * 6
    interpreter.remove_code_context(context.id)


def test_killing_the_sandbox_ends_the_cell(server):
    sandbox = Sandbox.create()
    threading.Timer(0.7, sandbox.kill).start()
    with pytest.raises(TimeoutException):
        sandbox.run_code("import time; time.sleep(60)", timeout=60)


# ---------------------------------------------------------------- sandboxes from one dump


def test_the_kernel_waits_in_the_dump_with_the_sandboxs_own_variables_and_randomness(server):
    draw = "import random, numpy, uuid, ssl; print(random.random(), numpy.random.rand(), uuid.uuid4(), ssl.RAND_bytes(8).hex())"
    drawn = []
    for name in ("one", "two"):
        with Sandbox.create(envs={"NAME": name}) as sandbox:
            begun = sandbox.commands.run("pgrep -cf '[i]pykernel_launcher'").stdout
            assert begun == "1\n", begun
            assert sandbox.run_code("import os; (os.environ['NAME'], os.environ['E2B_SANDBOX_ID'])").text == f"('{name}', '{sandbox.sandbox_id}')"
            drawn.append(printed(sandbox.run_code(draw)).split())
    assert all(mine != others for mine, others in zip(*drawn, strict=True)), drawn


def test_a_cell_goes_on_over_a_pause_and_keeps_its_seed(server):
    sandbox = Sandbox.create(timeout=120)

    def long_cell():
        try:
            sandbox.run_code("import random, time; random.seed(1)\nfor n in range(30):\n    time.sleep(0.1)\ndone = True", timeout=60)
        except SandboxException:
            pass  # the pause cuts its connection

    cell = threading.Thread(target=long_cell)
    cell.start()
    wait_for("the cell to run", lambda: sandbox.commands.run("pgrep -f ipykernel_launcher").stdout)
    time.sleep(0.5)
    sandbox.pause()
    cell.join()
    time.sleep(1)
    sandbox = Sandbox.connect(sandbox.sandbox_id)
    try:
        # It waits for the rest of the cell.
        assert sandbox.run_code("(n, done, random.random())", timeout=30).text == "(29, True, 0.13436424411240122)"
    finally:
        sandbox.kill()


def test_forks_go_on_by_themselves_with_other_random_numbers(server):
    with Sandbox.create(timeout=120) as source:
        source.run_code("import random, os; random.seed(1); x = ['shared']")
        source.run_code("n=1", language="bash")
        source.run_code("const j = 1", language="js")
        sandboxes = [source, *source.fork(count=2)]
        try:
            appended = [printed(each.run_code("x.append(os.environ['E2B_SANDBOX_ID']); print(x)")) for each in sandboxes]
            assert appended == [f"['shared', '{each.sandbox_id}']\n" for each in sandboxes]
            for language, code in (("python", "print(random.random())"), ("js", "console.log(j, Math.random())"), ("bash", "echo $n $RANDOM$RANDOM")):
                drawn = [printed(each.run_code(code, language=language)) for each in sandboxes]
                assert len(set(drawn)) == len(drawn), (language, drawn)
        finally:
            for each in sandboxes[1:]:
                each.kill()


def test_a_secured_sandbox_takes_no_other_token(server):
    with Sandbox.create(network={"allow_public_traffic": False}) as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
        wrong = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49999", "X-Access-Token": "wrong"}
        wrong["E2B-Traffic-Access-Token"] = sandbox.traffic_access_token
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/execute", method="POST", data=b'{"code":"1"}', headers=wrong)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10)
