"""Novita's `code_interpreter`, by its unmodified SDK of every version, on the server's own template."""

import asyncio
import time

import pytest
from novita_common import VERSION, bare
from novita_sandbox import code_interpreter
from novita_sandbox.code_interpreter import AsyncSandbox, Sandbox

HAS_CONTEXT_LISTS = hasattr(Sandbox, "list_code_contexts")


@pytest.fixture(scope="module")
def sandbox(server):
    sandbox = Sandbox.create(timeout=300, envs={"WHOSE": "sandbox"})
    yield sandbox
    sandbox.kill()


def printed(execution):
    assert execution.error is None, execution.error
    return "".join(execution.logs.stdout)


def pause(sandbox):
    (getattr(sandbox, "pause", None) or sandbox.beta_pause)()


def test_its_default_template_is_there_under_its_name(sandbox):
    """5: the name in the information is the alias that the SDK asks for."""
    assert code_interpreter.Sandbox.default_template == "code-interpreter-v1"
    assert sandbox.get_info().name == "code-interpreter-v1"


def test_values_output_errors_and_state(sandbox):
    execution = sandbox.run_code("import sys; kept = 41; print('out'); print('err', file=sys.stderr); kept + 1")
    assert (execution.text, execution.logs.stdout, execution.logs.stderr) == ("42", ["out\n"], ["err\n"])
    assert sandbox.run_code("kept += 1; kept").text == "42"
    failed = sandbox.run_code("1 / 0")
    assert (failed.error.name, failed.error.value) == ("ZeroDivisionError", "division by zero")
    assert "1 / 0" in failed.error.traceback and sandbox.run_code("kept").text == "42"


def test_callbacks_are_called_while_the_cell_runs(sandbox):
    seen = []
    begun = time.monotonic()
    told = lambda kind: lambda what: seen.append((kind, what, time.monotonic() - begun))
    code = "import sys, time\nprint('out', flush=True); time.sleep(0.7); print('err', file=sys.stderr); display('shown'); 1 / 0"
    sandbox.run_code(code, on_stdout=told("stdout"), on_stderr=told("stderr"), on_result=told("result"), on_error=told("error"))
    assert [kind for kind, _, _ in seen] == ["stdout", "stderr", "result", "error"]
    assert (seen[0][1].line, seen[1][1].line, seen[2][1].text, seen[3][1].name) == ("out\n", "err\n", "shown", "ZeroDivisionError")
    assert seen[0][2] < 0.6 < seen[1][2], seen


def test_a_runs_variables_come_first_and_are_gone_after_it(sandbox):
    """22: of the sandbox, of a run; in every language that the template has."""
    for language, code in (
        ("python", "import os; print(os.environ.get('WHOSE'), os.environ.get('RUNS', 'none'))"),
        ("js", "console.log(process.env.WHOSE, process.env.RUNS ?? 'none')"),
        ("bash", 'echo "$WHOSE ${RUNS:-none}"'),
    ):
        run = lambda **more: printed(sandbox.run_code(code, language=language, **more))
        assert run() == "sandbox none\n", language
        assert run(envs={"WHOSE": "run", "RUNS": "own"}) == "run own\n", language
        assert run() == "sandbox none\n", language


def test_contexts_have_folders_and_variables_of_their_own(sandbox):
    context = sandbox.create_code_context(cwd="/tmp", language="python")
    assert (context.cwd, context.language) == ("/tmp", "python")
    assert sandbox.run_code("import os; apart = 1; os.getcwd()", context=context).text == "/tmp"
    assert sandbox.run_code("'apart' in globals()").text == "False"
    script = sandbox.create_code_context(language="js")
    assert sandbox.run_code("const n = 40; n + 2", context=script).text == "42"
    with pytest.raises(Exception, match="but not both"):
        sandbox.run_code("1", context=context, language="js")
    if HAS_CONTEXT_LISTS:
        assert {context.id, script.id} <= {listed.id for listed in sandbox.list_code_contexts()}
        sandbox.restart_code_context(context)
        assert sandbox.run_code("apart", context=context).error.name == "NameError"
        sandbox.remove_code_context(context)
        sandbox.delete_code_context(script.id)
        assert not {context.id, script.id} & {listed.id for listed in sandbox.list_code_contexts()}
        with pytest.raises(Exception, match="not found"):
            sandbox.run_code("1", context=context)


def test_pictures_charts_and_tables_have_their_fields(sandbox):
    figure = sandbox.run_code("import matplotlib.pyplot as plt\nplt.bar(['one'], [3]); plt.title('Bars'); plt.show()").results[0]
    assert figure.png and (figure.chart.type.value, figure.chart.title) == ("bar", "Bars")
    table = sandbox.run_code("import pandas; pandas.DataFrame({'a': [1, 2]})").results[0]
    assert "<table" in table.html and table.data == {"a": [1, 2]}


def test_a_run_that_takes_too_long_is_given_up_and_its_state_stays(sandbox):
    with pytest.raises(Exception, match="(?i)timed? ?out"):
        sandbox.run_code("given_up = True\nwhile True: pass", timeout=0.5)
    assert sandbox.run_code("given_up", timeout=20).text == "True"


def test_variables_survive_a_pause_and_another_client_goes_on_with_them(server):
    """7, 10, 23: by connect, which resumes."""
    sandbox = Sandbox.create(timeout=60)
    sandbox.run_code("kept = ['before']")
    pause(sandbox)
    with pytest.raises(Exception):
        sandbox.run_code("kept")
    again = Sandbox.connect(sandbox.sandbox_id)
    assert again.run_code("kept.append('after'); kept").text == "['before', 'after']"
    again.kill()
    with pytest.raises(Exception):
        again.run_code("kept")


def test_a_run_wakes_a_sandbox_that_resumes_by_itself(server):
    """31."""
    sandbox = Sandbox.create(timeout=60, metadata={"auto_resume": "true"})
    sandbox.run_code("kept = 1")
    pause(sandbox)
    assert sandbox.run_code("kept").text == "1"
    sandbox.kill()


@pytest.mark.skipif(VERSION.startswith("1.0."), reason="1.0 has no clones")
def test_clones_have_the_variables_and_diverge(server):
    """32."""
    parent = Sandbox.create(timeout=60)
    parent.run_code("kept = ['shared']")
    clones = list(Sandbox.clone(parent.sandbox_id, 2))
    for made in (parent, *clones):
        # Whatever class its method returns: the same sandbox by this module's.
        each = Sandbox.connect(made.sandbox_id)
        assert each.run_code(f"kept.append('{bare(each.sandbox_id)}'); kept").text == f"['shared', '{bare(each.sandbox_id)}']"
    for made in (parent, *clones):
        made.kill()


def test_the_asynchronous_client_works_as_well(server):
    async def everything():
        sandbox = await AsyncSandbox.create(timeout=60)
        lines = []
        execution = await sandbox.run_code("print('async'); 6 * 7", on_stdout=lambda out: lines.append(out.line))
        context = await sandbox.create_code_context(cwd="/tmp")
        folder = await sandbox.run_code("import os; os.getcwd()", context=context)
        await sandbox.kill()
        return execution.text, lines, folder.text

    assert asyncio.run(everything()) == ("42", ["async\n"], "/tmp")
