//! Dockerfiles as recipes for builds: the subset that our builds can do, everything else refused with its line.
//!
//! One stage; FROM, RUN, COPY, ADD of local files, ENV, ARG, WORKDIR, USER, CMD, ENTRYPOINT. Read as E2B's SDKs do it:
//! steps begin as root in `/`, and a file that names neither USER nor WORKDIR ends as `user` in `/home/user`. What only
//! says something about containers (LABEL, EXPOSE, …) is left out and told. Pure: the context is read by its caller.

mod words;

use parse_dockerfile::{Command, CopyInstruction, Flag, Instruction, RunInstruction, Source};
use std::collections::BTreeMap;

/// What E2B's SDKs wait for after a CMD, since nothing tells when it is ready.
const READY_AFTER_START: &str = "sleep 20";

/// Why a Dockerfile cannot be built here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Dockerfile line {line}: {problem}")]
pub struct DockerfileError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub problem: String,
}

/// A Dockerfile, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    /// The base image.
    pub from: String,
    /// What is done to it, in order.
    pub steps: Vec<Step>,
    /// ENTRYPOINT and CMD.
    pub start_command: Option<String>,
    /// What tells that it is ready.
    pub ready_command: Option<String>,
    /// Instructions that mean nothing here, with their lines.
    pub left_out: Vec<String>,
}

/// One step of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A shell command.
    Run(String),
    /// Files of the context.
    Copy {
        /// Path or pattern in the context.
        source: String,
        /// Where they go.
        target: String,
        /// `--chown`.
        owner: Option<String>,
        /// `--chmod`.
        mode: Option<String>,
        /// For errors about the files.
        line: usize,
    },
    /// Names and values.
    Env(Vec<(String, String)>),
    /// The folder of what follows.
    Workdir(String),
    /// The user of what follows.
    User(String),
}

impl Dockerfile {
    /// Reads the file. `arguments` are values for its ARGs.
    pub fn parse(text: &str, arguments: &BTreeMap<String, String>) -> Result<Self, DockerfileError> {
        let parsed = parse_dockerfile::parse(text).map_err(|error| syntax_error(&error.to_string()))?;
        let mut reader = Reader { text, arguments, globals: BTreeMap::new(), found: Found::default() };
        parsed.instructions.iter().try_for_each(|instruction| reader.instruction(instruction))?;
        reader.finish()
    }
}

/// The parser's own message ends with `(line:column)` or is about the file as a whole.
fn syntax_error(message: &str) -> DockerfileError {
    let place = message.rsplit_once("line ").and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    DockerfileError { line: place.unwrap_or(1), problem: message.to_owned() }
}

#[derive(Default)]
struct Found {
    from: Option<String>,
    steps: Vec<Step>,
    entrypoint: Option<Start>,
    command: Option<Start>,
    left_out: Vec<String>,
}

/// CMD or ENTRYPOINT.
enum Start {
    Shell(String),
    Exec(Vec<String>),
}

struct Reader<'a> {
    text: &'a str,
    arguments: &'a BTreeMap<String, String>,
    /// ARGs before FROM, which FROM may use.
    globals: BTreeMap<String, String>,
    found: Found,
}

impl Reader<'_> {
    fn line_of(&self, offset: usize) -> usize {
        self.text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
    }

    fn refused(&self, offset: usize, problem: impl Into<String>) -> DockerfileError {
        DockerfileError { line: self.line_of(offset), problem: problem.into() }
    }

    fn instruction(&mut self, instruction: &Instruction<'_>) -> Result<(), DockerfileError> {
        match instruction {
            Instruction::From(from) => {
                let at = from.from.span.start;
                if self.found.from.is_some() {
                    return Err(self.refused(
                        at,
                        "a second FROM: builds have one stage; build the first one as a template of its own and copy what it makes",
                    ));
                }
                self.check_flags(&from.options, &[("platform", Some("linux/amd64"))])?;
                self.found.from = Some(words::substituted(&from.image.value, &self.globals));
            }
            Instruction::Arg(arg) => self.arg(arg.arg.span.start, &arg.arguments.value)?,
            Instruction::Env(env) => {
                let pairs = words::pairs(&env.arguments.value).map_err(|problem| self.refused(env.env.span.start, problem))?;
                self.found.steps.push(Step::Env(pairs));
            }
            Instruction::Run(run) => self.run(run)?,
            Instruction::Copy(copy) => self.copy(copy)?,
            Instruction::Add(add) => {
                self.check_flags(&add.options, &[("chown", None), ("chmod", None)])?;
                self.files(add.add.span.start, &add.options, &add.src, &add.dest.value)?;
            }
            Instruction::Workdir(workdir) => self.found.steps.push(Step::Workdir(words::unquoted(&workdir.arguments.value))),
            Instruction::User(user) => {
                let name = words::unquoted(&user.arguments.value);
                self.found.steps.push(Step::User(name.split(':').next().unwrap_or_default().to_owned()));
            }
            Instruction::Cmd(cmd) => self.found.command = start_of(&cmd.arguments),
            Instruction::Entrypoint(entrypoint) => {
                self.found.entrypoint = start_of(&entrypoint.arguments);
                // As in Docker: a CMD before it was meant for another one.
                self.found.command = None;
            }
            Instruction::Shell(shell) => {
                let words: Vec<&str> = shell.arguments.iter().map(|word| &*word.value).collect();
                let is_bash = words.first().is_some_and(|program| program.ends_with("bash")) && words.last() == Some(&"-c");
                if !is_bash {
                    return Err(self.refused(shell.shell.span.start, "SHELL: commands are run by bash, and by nothing else"));
                }
            }
            Instruction::Onbuild(onbuild) => {
                return Err(
                    self.refused(onbuild.onbuild.span.start, "ONBUILD: templates have no triggers; put the instruction where it is to run")
                );
            }
            Instruction::Expose(other) => self.leave_out(other.expose.span.start, "EXPOSE", "every port of a sandbox can be reached"),
            Instruction::Label(other) => self.leave_out(other.label.span.start, "LABEL", "templates have names and tags"),
            Instruction::Maintainer(other) => self.leave_out(other.maintainer.span.start, "MAINTAINER", "templates have none"),
            Instruction::Healthcheck(other) => {
                self.leave_out(
                    other.healthcheck.span.start,
                    "HEALTHCHECK",
                    "give --ready-command for what tells that the start command is ready",
                );
            }
            Instruction::Stopsignal(other) => self.leave_out(other.stopsignal.span.start, "STOPSIGNAL", "sandboxes are paused or killed"),
            Instruction::Volume(other) => self.leave_out(other.volume.span.start, "VOLUME", "all of a sandbox's disk is its own"),
            // The parser's enum may grow.
            _ => return Err(self.refused(0, "it has an instruction that is not known here")),
        }
        Ok(())
    }

    fn leave_out(&mut self, offset: usize, name: &str, why: &str) {
        let line = self.line_of(offset);
        self.found.left_out.push(format!("line {line}: {name} means nothing here: {why}"));
    }

    fn arg(&mut self, offset: usize, text: &str) -> Result<(), DockerfileError> {
        let words = words::split(text).map_err(|problem| self.refused(offset, problem))?;
        let mut pairs = Vec::new();
        for word in words {
            let (name, default) = word.split_once('=').unwrap_or((&word, ""));
            let given = self.arguments.get(name).map(String::as_str);
            let inherited = self.globals.get(name).map(String::as_str).filter(|_| !word.contains('='));
            pairs.push((name.to_owned(), given.or(inherited).unwrap_or(default).to_owned()));
        }
        match self.found.from {
            None => self.globals.extend(pairs),
            Some(_) => self.found.steps.push(Step::Env(pairs)),
        }
        Ok(())
    }

    fn run(&mut self, run: &RunInstruction<'_>) -> Result<(), DockerfileError> {
        self.check_flags(&run.options, &[])?;
        let script = match (&run.arguments, run.here_docs.first()) {
            (Command::Shell(shell), Some(body)) => {
                if !shell.value.trim().is_empty() {
                    return Err(self.refused(run.run.span.start, "RUN: a here-document is read alone, without a command beside it"));
                }
                body.value.to_string()
            }
            (Command::Shell(shell), None) => words::without_comments(shell.value),
            (Command::Exec(exec), _) => words::quoted(exec.value.iter().map(|word| &*word.value)),
            // The parser's enums may grow.
            _ => return Err(self.refused(run.run.span.start, "RUN: this form is not known here")),
        };
        self.found.steps.push(Step::Run(script));
        Ok(())
    }

    fn copy(&mut self, copy: &CopyInstruction<'_>) -> Result<(), DockerfileError> {
        if let Some(flag) = copy.options.iter().find(|flag| flag.name.value == "from") {
            return Err(self.refused(flag.span().start, "COPY --from: builds have one stage and no other images; copy from the context"));
        }
        // --link is about Docker's cache only.
        self.check_flags(&copy.options, &[("chown", None), ("chmod", None), ("link", None)])?;
        self.files(copy.copy.span.start, &copy.options, &copy.src, &copy.dest.value)
    }

    fn files(&mut self, offset: usize, options: &[Flag<'_>], sources: &[Source<'_>], target: &str) -> Result<(), DockerfileError> {
        let option = |name: &str| {
            let flag = options.iter().find(|flag| flag.name.value == name)?;
            flag.value.as_ref().map(|value| value.value.to_string())
        };
        let is_folder_wanted = sources.len() > 1 && !target.ends_with('/');
        let target = words::unquoted(target);
        let line = self.line_of(offset);
        for source in sources {
            let source = match source {
                Source::Path(path) => words::unquoted(&path.value),
                // Here-documents, and what the parser may know some day.
                _ => return Err(self.refused(offset, "COPY of a here-document: put the file into the context")),
            };
            if source.contains("://") || source.starts_with("git@") {
                return Err(self.refused(offset, format!("ADD {source}: only files of the context are added; fetch it with RUN curl")));
            }
            if is_archive(&source) && self.text[offset..].to_ascii_uppercase().starts_with("ADD") {
                return Err(self.refused(offset, format!("ADD {source}: archives are not unpacked; COPY it and RUN tar")));
            }
            let target = if is_folder_wanted { format!("{target}/") } else { target.clone() };
            self.found.steps.push(Step::Copy { source, target, owner: option("chown"), mode: option("chmod"), line });
        }
        Ok(())
    }

    /// Flags with the only value that they may have, if there is one.
    fn check_flags(&self, flags: &[Flag<'_>], known: &[(&str, Option<&str>)]) -> Result<(), DockerfileError> {
        for flag in flags {
            let value = flag.value.as_ref().map(|value| &*value.value);
            match known.iter().find(|(name, _)| *name == flag.name.value) {
                None => return Err(self.refused(flag.span().start, format!("--{} is not known to builds here", flag.name.value))),
                Some((name, Some(only))) if value != Some(only) => {
                    return Err(self.refused(flag.span().start, format!("--{name} can only be {only}")));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Dockerfile, DockerfileError> {
        let from = self.found.from.ok_or(DockerfileError { line: 1, problem: "it has no FROM".to_owned() })?;
        let has_user = self.found.steps.iter().any(|step| matches!(step, Step::User(_)));
        let has_workdir = self.found.steps.iter().any(|step| matches!(step, Step::Workdir(_)));
        let mut steps = vec![Step::User("root".to_owned()), Step::Workdir("/".to_owned())];
        steps.extend(self.found.steps);
        if !has_user {
            steps.push(Step::User("user".to_owned()));
        }
        if !has_workdir {
            steps.push(Step::Workdir("/home/user".to_owned()));
        }
        let start_command = joined(self.found.entrypoint, self.found.command);
        let ready_command = start_command.as_ref().map(|_| READY_AFTER_START.to_owned());
        Ok(Dockerfile { from, steps, start_command, ready_command, left_out: self.found.left_out })
    }
}

fn start_of(command: &Command<'_>) -> Option<Start> {
    match command {
        Command::Shell(shell) => Some(Start::Shell(words::without_comments(shell.value))),
        Command::Exec(exec) => Some(Start::Exec(exec.value.iter().map(|word| word.value.to_string()).collect())),
        // The parser's enum may grow.
        _ => None,
    }
}

/// As Docker does: a shell ENTRYPOINT takes no arguments, an exec one takes CMD's.
fn joined(entrypoint: Option<Start>, command: Option<Start>) -> Option<String> {
    let shown = |words: &[String]| words::quoted(words.iter().map(String::as_str));
    match (entrypoint, command) {
        (Some(Start::Shell(entrypoint)), _) => Some(entrypoint),
        (Some(Start::Exec(mut words)), command) => {
            match command {
                Some(Start::Exec(more)) => words.extend(more),
                Some(Start::Shell(more)) => words.extend(["/bin/sh".to_owned(), "-c".to_owned(), more]),
                None => {}
            }
            Some(shown(&words))
        }
        (None, Some(Start::Shell(command))) => Some(command),
        (None, Some(Start::Exec(words))) => Some(shown(&words)).filter(|command| !command.is_empty()),
        (None, None) => None,
    }
}

fn is_archive(source: &str) -> bool {
    [".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst"].iter().any(|end| source.ends_with(end))
}

#[cfg(test)]
mod tests;
