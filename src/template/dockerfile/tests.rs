//! What becomes of Dockerfiles that people have, and what is refused with its line.

use super::*;

fn parsed(text: &str) -> Dockerfile {
    Dockerfile::parse(text, &BTreeMap::new()).unwrap()
}

fn refusal(text: &str) -> String {
    Dockerfile::parse(text, &BTreeMap::new()).unwrap_err().to_string()
}

/// Without the steps that are put around every file's own.
fn own_steps(text: &str) -> Vec<Step> {
    let mut steps = parsed(text).steps;
    assert_eq!(steps.drain(..2).collect::<Vec<_>>(), [Step::User("root".into()), Step::Workdir("/".into())]);
    steps.truncate(steps.len() - 2);
    steps
}

fn copy(source: &str, target: &str, line: usize) -> Step {
    Step::Copy { source: source.into(), target: target.into(), owner: None, mode: None, line }
}

#[test]
fn a_usual_file_becomes_steps_and_a_start_command() {
    let text = "# a comment\nARG VERSION=3.12\nFROM --platform=linux/amd64 python:${VERSION}-slim AS only\n\
                ENV A=1 B=\"two words\"\nENV OLD form of it\nWORKDIR /app\nCOPY --chown=user:user --chmod=755 requirements.txt .\n\
                RUN apt-get update && \\\n    # why\n    apt-get install -y git\nUSER app:app\nEXPOSE 80\nCMD [\"python\", \"-m\", \"my app\"]\n";
    let file = parsed(text);
    assert_eq!(file.from, "python:3.12-slim");
    assert_eq!(file.steps[2], Step::Env(vec![("A".into(), "1".into()), ("B".into(), "two words".into())]));
    assert_eq!(file.steps[3], Step::Env(vec![("OLD".into(), "form of it".into())]));
    assert_eq!(file.steps[4], Step::Workdir("/app".into()));
    let copied = Step::Copy {
        source: "requirements.txt".into(),
        target: ".".into(),
        owner: Some("user:user".into()),
        mode: Some("755".into()),
        line: 7,
    };
    assert_eq!(file.steps[5], copied);
    assert_eq!(file.steps[6], Step::Run("apt-get update && \\\n    apt-get install -y git".into()));
    assert_eq!(file.steps[7], Step::User("app".into()));
    assert_eq!(file.steps.len(), 8, "USER and WORKDIR are its own: {:?}", file.steps);
    assert_eq!((file.start_command.as_deref(), file.ready_command.as_deref()), (Some("python -m 'my app'"), Some("sleep 20")));
    assert_eq!(file.left_out, ["line 12: EXPOSE means nothing here: every port of a sandbox can be reached"]);
}

#[test]
fn a_file_that_names_no_user_ends_as_user_in_its_home() {
    let steps = parsed("FROM debian\nRUN true\n").steps;
    assert_eq!(steps[3..], [Step::User("user".into()), Step::Workdir("/home/user".into())]);
}

#[test]
fn several_sources_go_into_a_folder_and_exec_forms_are_quoted() {
    let text = "FROM debian\nCOPY a \"b\" /dest\nADD c /c\nRUN [\"echo\", \"it's\"]\nRUN <<EOF\necho 1\necho 2\nEOF\n";
    let expected = [
        copy("a", "/dest/", 2),
        copy("b", "/dest/", 2),
        copy("c", "/c", 3),
        Step::Run(r"echo 'it'\''s'".into()),
        Step::Run("echo 1\necho 2\n".into()),
    ];
    assert_eq!(own_steps(text), expected);
}

#[test]
fn arguments_are_taken_from_the_command_line_first() {
    let given = BTreeMap::from([("TAG".to_owned(), "24.04".to_owned()), ("B".to_owned(), "given".to_owned())]);
    let file = Dockerfile::parse("ARG TAG=22.04\nFROM ubuntu:$TAG\nARG TAG\nARG B=b\nARG C\n", &given).unwrap();
    assert_eq!(file.from, "ubuntu:24.04");
    let env = |name: &str, value: &str| Step::Env(vec![(name.into(), value.into())]);
    assert_eq!(file.steps[2..5], [env("TAG", "24.04"), env("B", "given"), env("C", "")]);
}

#[test]
fn entrypoint_and_cmd_are_joined_as_docker_does() {
    let start = |text: &str| parsed(&format!("FROM debian\n{text}\n")).start_command;
    assert_eq!(start("ENTRYPOINT [\"/e\", \"x\"]\nCMD [\"a b\"]").as_deref(), Some("/e x 'a b'"));
    assert_eq!(start("CMD old\nENTRYPOINT [\"/e\"]").as_deref(), Some("/e"));
    assert_eq!(start("ENTRYPOINT exec top -b\nCMD [\"ignored\"]").as_deref(), Some("exec top -b"));
    assert_eq!(start("CMD server --port $PORT").as_deref(), Some("server --port $PORT"));
    assert_eq!(start("RUN true"), None);
}

#[test]
fn what_builds_cannot_do_is_refused_with_its_line() {
    for (text, expected) in [
        ("FROM a\nRUN x\nFROM b\n", "Dockerfile line 3: a second FROM"),
        ("FROM a\nCOPY --from=b /x /y\n", "Dockerfile line 2: COPY --from"),
        ("FROM a\n\nRUN --mount=type=cache,target=/x y\n", "Dockerfile line 3: --mount is not known"),
        ("FROM --platform=linux/arm64 a\n", "Dockerfile line 1: --platform can only be linux/amd64"),
        ("FROM a\nADD https://example.org/x /x\n", "Dockerfile line 2: ADD https://example.org/x: only files"),
        ("FROM a\nADD x.tar.gz /x\n", "Dockerfile line 2: ADD x.tar.gz: archives are not unpacked"),
        ("FROM a\nSHELL [\"powershell\", \"-command\"]\n", "Dockerfile line 2: SHELL"),
        ("FROM a\nONBUILD RUN x\n", "Dockerfile line 2: ONBUILD"),
        ("FROM a\nCOPY <<EOF /x\nhello\nEOF\n", "Dockerfile line 2: COPY of a here-document"),
        ("FROM a\nENV A=\"open\n", "Dockerfile line 2: a quote is not closed"),
        ("FROM a\nFRUM b\n", "Dockerfile line 2:"),
    ] {
        let message = refusal(text);
        assert!(message.starts_with(expected), "{text:?}: {message}");
    }
}
