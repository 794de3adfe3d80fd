import java.io.BufferedReader;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.List;
import java.util.Locale;
import java.util.stream.Collectors;
import jdk.jshell.DeclarationSnippet;
import jdk.jshell.EvalException;
import jdk.jshell.JShell;
import jdk.jshell.JShellException;
import jdk.jshell.Snippet;
import jdk.jshell.SnippetEvent;
import jdk.jshell.SourceCodeAnalysis;

/**
 * The kernel of Java: runs cells in one jshell, inside this machine. Requests come on stdin, events go to the FIFO that
 * the last argument names; agent/src/interpreter/lines.rs tells the wire. Variables of the sandbox are system properties,
 * as in E2B's Java, since a running machine's environment cannot be changed.
 */
public final class JavaKernel {
    private static final String IMPORTS = "java.io java.math java.net java.nio.file java.util java.util.concurrent "
        + "java.util.function java.util.regex java.util.stream";

    private final OutputStream events;
    private final JShell shell;
    private volatile boolean isInterrupted;

    private JavaKernel(OutputStream events) {
        this.events = events;
        PrintStream out = printer("out");
        PrintStream err = printer("err");
        System.setOut(out);
        System.setErr(err);
        System.getenv().forEach((name, value) -> System.getProperties().putIfAbsent(name, value));
        shell = JShell.builder().executionEngine("local").out(out).err(err).build();
        for (String name : IMPORTS.split(" ")) {
            shell.eval("import " + name + ".*;");
        }
    }

    public static void main(String[] arguments) throws IOException {
        BufferedReader requests = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII));
        JavaKernel kernel = new JavaKernel(new FileOutputStream(arguments[arguments.length - 1]));
        sun.misc.Signal.handle(new sun.misc.Signal("INT"), signal -> kernel.interrupt());
        kernel.tell("ready");
        for (String line = requests.readLine(); line != null; line = requests.readLine()) {
            kernel.obey(line.split(" "));
        }
    }

    private void obey(String[] words) {
        switch (words[0]) {
            case "run" -> run(decoded(words[1]));
            case "set" -> System.setProperty(decoded(words[1]), words.length > 2 ? decoded(words[2]) : "");
            case "unset" -> System.clearProperty(decoded(words[1]));
            default -> { }
        }
    }

    private static String decoded(String word) {
        return new String(Base64.getDecoder().decode(word), StandardCharsets.UTF_8);
    }

    private synchronized void tell(String verb, String... words) {
        StringBuilder line = new StringBuilder(verb);
        for (String word : words) {
            line.append(' ').append(Base64.getEncoder().encodeToString(word.getBytes(StandardCharsets.UTF_8)));
        }
        try {
            events.write(line.append('\n').toString().getBytes(StandardCharsets.US_ASCII));
        } catch (IOException gone) {
            Runtime.getRuntime().halt(1);
        }
    }

    /** Whatever is printed is an event at once. */
    private PrintStream printer(String verb) {
        OutputStream telling = new OutputStream() {
            @Override public void write(int single) {
                write(new byte[] {(byte) single}, 0, 1);
            }

            @Override public void write(byte[] bytes, int start, int length) {
                tell(verb, new String(bytes, start, length, StandardCharsets.UTF_8));
            }
        };
        return new PrintStream(telling, true, StandardCharsets.UTF_8) { };
    }

    private void interrupt() {
        if (isInterrupted) {
            // The cell did not let itself be stopped; the context begins anew.
            Runtime.getRuntime().halt(130);
        }
        isInterrupted = true;
        shell.stop();
    }

    private void run(String code) {
        isInterrupted = false;
        String value = null;
        boolean isWhole = true;
        for (String rest = code; isWhole && !rest.isBlank(); ) {
            SourceCodeAnalysis.CompletionInfo next = shell.sourceCodeAnalysis().analyzeCompletion(rest);
            String source = next.completeness().isComplete() ? next.source() : rest;
            rest = next.completeness().isComplete() ? next.remaining() : "";
            value = null;
            for (SnippetEvent event : shell.eval(source)) {
                isWhole &= isWell(event);
                if (event.causeSnippet() == null && isExpression(event.snippet()) && event.exception() == null) {
                    value = event.value();
                }
            }
        }
        if (isWhole && value != null && !value.isEmpty()) {
            tell("result", "text/plain", value);
        }
        tell("done");
    }

    private static boolean isExpression(Snippet snippet) {
        return snippet.kind() == Snippet.Kind.EXPRESSION || snippet.subKind() == Snippet.SubKind.TEMP_VAR_EXPRESSION_SUBKIND;
    }

    /** Tells what went wrong with a snippet; later snippets of the cell are not run then. */
    private boolean isWell(SnippetEvent event) {
        if (event.exception() != null) {
            tellException(event.exception());
            return false;
        }
        if (event.causeSnippet() != null) {
            return true;
        }
        if (event.status() == Snippet.Status.REJECTED) {
            String problems = shell.diagnostics(event.snippet()).map(problem -> problem.getMessage(Locale.ENGLISH)).collect(Collectors.joining("\n"));
            tell("error", "CompilationException", problems, event.snippet().source() + "\n" + problems);
            return false;
        }
        List<String> missing = event.snippet() instanceof DeclarationSnippet declaration
            ? shell.unresolvedDependencies(declaration).toList() : List.of();
        if (!missing.isEmpty()) {
            System.err.println("declared, but not to be used before there is " + String.join(", ", missing));
        }
        return true;
    }

    private void tellException(JShellException exception) {
        String name = exception instanceof EvalException thrown ? thrown.getExceptionClassName() : exception.getClass().getSimpleName();
        String message = exception.getMessage() == null ? "" : exception.getMessage();
        StringBuilder trace = new StringBuilder(name + ": " + message);
        for (StackTraceElement element : exception.getStackTrace()) {
            trace.append("\n    at ").append(element);
        }
        tell("error", name, message, trace.toString());
    }
}
