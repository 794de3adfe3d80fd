//! Starts one process: resolves user, directory, program and environment, and connects pipes or a PTY.
//!
//! Everything that can be told beforehand is told beforehand, since a child can report nothing but an errno. Runs on
//! the agent's one thread from start to end, so the reaper cannot see the child before it is registered.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Pid, Uid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::paths::{self, PathError};
use crate::state::{INTERNAL_ENVS, Identity};
use crate::sys::launch::{self as sys, ChildSetup, Program};
use crate::users::User;

/// Above the agent's own, so that the kernel takes commands first when memory runs out.
const OOM_SCORE_ADJ: i32 = 100;

/// What the client asked for, echoed by List.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ProcessConfig {
    pub(crate) cmd: String,
    pub(crate) args: Vec<String>,
    pub(crate) envs: BTreeMap<String, String>,
    /// None means the sandbox's default workdir.
    pub(crate) cwd: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terminal {
    Pty(Size),
    Pipes { stdin: Stdin },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stdin {
    Open,
    /// At its end from the start.
    Null,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cols: u16,
    pub(crate) rows: u16,
}

#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) streams: Streams,
}

/// The agent's ends.
#[derive(Debug)]
pub(crate) enum Streams {
    Pipes { stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd },
    Pty(OwnedFd),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    #[error("command is empty")]
    NoCommand,
    #[error("command, arguments and environment must not contain NUL bytes")]
    Nul,
    #[error("environment variable name '{name}' is empty or contains '='")]
    EnvName { name: String },
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("cwd '{path}' does not exist")]
    CwdMissing { path: PathBuf },
    #[error("cwd '{path}' is not a directory")]
    CwdNotDirectory { path: PathBuf },
    #[error("exec: \"{program}\": executable file not found in $PATH")]
    NotFound { program: String },
    #[error("could not allocate a pseudo terminal")]
    Pty(#[source] io::Error),
    #[error("could not make pipes: {0}")]
    Pipes(#[source] io::Error),
    #[error("fork/exec {program}: {source}")]
    Exec { program: String, source: io::Error },
}

pub(crate) fn spawn(identity: &Identity, user: &User, config: &ProcessConfig, terminal: Terminal) -> Result<Spawned, SpawnError> {
    check_words(config)?;
    let cwd = working_directory(identity, user, config.cwd.as_deref())?;
    let envs = environment(identity, user, &config.envs);
    let program = find_program(&config.cmd, &envs)?;
    let (ours, stdio) = connect(user, terminal)?;
    let words = std::iter::once(&config.cmd).chain(&config.args);
    let program = Program {
        path: terminated(program.as_os_str().as_bytes())?,
        arguments: words.map(|word| terminated(word.as_bytes())).collect::<Result<_, _>>()?,
        environment: envs.iter().map(|(name, value)| terminated(format!("{name}={value}").as_bytes())).collect::<Result<_, _>>()?,
    };
    let setup = ChildSetup {
        controls_terminal: matches!(ours, Streams::Pty(_)),
        oom_score_adj: OOM_SCORE_ADJ,
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.iter().copied().chain([user.gid]).collect(),
        cwd: terminated(cwd.as_os_str().as_bytes())?,
    };
    let launched = sys::launch(&program, &stdio, &setup);
    let (pid, pidfd) = launched.map_err(|source| SpawnError::Exec { program: config.cmd.clone(), source })?;
    Ok(Spawned { pid, pidfd, streams: ours })
}

fn terminated(word: &[u8]) -> Result<CString, SpawnError> {
    CString::new(word).map_err(|_| SpawnError::Nul)
}

fn check_words(config: &ProcessConfig) -> Result<(), SpawnError> {
    if config.cmd.is_empty() {
        return Err(SpawnError::NoCommand);
    }
    if let Some(name) = config.envs.keys().find(|name| name.is_empty() || name.contains('=')) {
        return Err(SpawnError::EnvName { name: name.clone() });
    }
    let envs = config.envs.iter().flat_map(|(name, value)| [name, value]);
    if std::iter::once(&config.cmd).chain(&config.args).chain(envs).any(|word| word.contains('\0')) {
        return Err(SpawnError::Nul);
    }
    Ok(())
}

fn working_directory(identity: &Identity, user: &User, asked: Option<&str>) -> Result<PathBuf, SpawnError> {
    let path = paths::resolve(asked.unwrap_or_default(), user, &identity.default_workdir)?;
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(SpawnError::CwdNotDirectory { path }),
        Err(_) => Err(SpawnError::CwdMissing { path }),
    }
}

/// The agent's PATH and the user's names, below the sandbox's variables, below the request's; what tells a program
/// that it runs in a sandbox, and in which, cannot be overridden.
fn environment(identity: &Identity, user: &User, asked: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut envs = BTreeMap::from([
        ("PATH".to_owned(), identity.path.clone()),
        ("HOME".to_owned(), user.home.to_string_lossy().into_owned()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
    ]);
    let own = identity.envs.iter().filter(|(name, _)| INTERNAL_ENVS.contains(&name.as_str()));
    for (name, value) in identity.envs.iter().chain(asked).chain(own) {
        envs.insert(name.clone(), value.clone());
    }
    envs
}

/// A name without a slash is looked up in the PATH that the process will have.
fn find_program(cmd: &str, envs: &BTreeMap<String, String>) -> Result<PathBuf, SpawnError> {
    if cmd.contains('/') {
        return Ok(PathBuf::from(cmd));
    }
    let folders = envs.get("PATH").map_or("", String::as_str).split(':').filter(|folder| folder.starts_with('/'));
    let candidates = folders.map(|folder| Path::new(folder).join(cmd));
    candidates.into_iter().find(|path| is_executable(path)).ok_or_else(|| SpawnError::NotFound { program: cmd.to_owned() })
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The agent's ends, and what the process has as 0, 1 and 2.
fn connect(user: &User, terminal: Terminal) -> Result<(Streams, [OwnedFd; 3]), SpawnError> {
    match terminal {
        Terminal::Pipes { stdin } => pipes(stdin).map_err(SpawnError::Pipes),
        Terminal::Pty(size) => {
            let (master, slave) = open_pty(user, size).map_err(SpawnError::Pty)?;
            let copy = || slave.try_clone().map_err(SpawnError::Pty);
            Ok((Streams::Pty(master), [copy()?, copy()?, slave]))
        }
    }
}

fn pipes(stdin: Stdin) -> io::Result<(Streams, [OwnedFd; 3])> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let (our_stdin, stdin) = match stdin {
        Stdin::Open => {
            let (theirs, ours) = pipe()?;
            (Some(ours), theirs)
        }
        Stdin::Null => (None, OwnedFd::from(fs::File::open("/dev/null")?)),
    };
    let (our_stdout, stdout) = pipe()?;
    let (our_stderr, stderr) = pipe()?;
    Ok((Streams::Pipes { stdin: our_stdin, stdout: our_stdout, stderr: our_stderr }, [stdin, stdout, stderr]))
}

fn open_pty(user: &User, size: Size) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    // So that programs of the user can open their terminal by name.
    rustix::fs::fchown(&slave, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
    resize(&master, size)?;
    Ok((master, slave))
}

pub(super) fn resize(master: impl AsFd, size: Size) -> io::Result<()> {
    let winsize = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(master, winsize)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Access;

    fn identity() -> Identity {
        let envs = BTreeMap::from([("E2B_SANDBOX_ID".into(), "i1".into()), ("A".into(), "sandbox".into())]);
        Identity { access: Access::Open, envs, path: "/usr/bin:/bin".into(), ..Identity::generic(String::new()) }
    }

    fn user() -> User {
        User { name: "user".into(), uid: 1000, gid: 1000, groups: vec![27], home: "/tmp".into() }
    }

    #[test]
    fn request_variables_win_over_the_sandboxs_but_not_over_its_identity() {
        let asked = [("A", "request"), ("E2B_SANDBOX_ID", "forged"), ("HOME", "/elsewhere")];
        let envs = environment(&identity(), &user(), &asked.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        assert_eq!((envs["A"].as_str(), envs["E2B_SANDBOX_ID"].as_str()), ("request", "i1"));
        assert_eq!((envs["HOME"].as_str(), envs["USER"].as_str(), envs["PATH"].as_str()), ("/elsewhere", "user", "/usr/bin:/bin"));
    }

    #[test]
    fn a_bare_name_is_found_in_the_processs_own_path() {
        let path = |value: &str| BTreeMap::from([("PATH".to_owned(), value.to_owned())]);
        assert!(find_program("sh", &path("relative:/nowhere:/bin")).unwrap().ends_with("sh"));
        assert_eq!(find_program("sh", &path("/nowhere")).unwrap_err().to_string(), "exec: \"sh\": executable file not found in $PATH");
        assert_eq!(find_program("./x", &path("")).unwrap(), Path::new("./x"));
    }

    #[test]
    fn bad_requests_are_refused_by_name_before_anything_runs() {
        let config = |cmd: &str, env: &str| ProcessConfig {
            cmd: cmd.into(),
            envs: BTreeMap::from([(env.into(), String::new())]),
            ..Default::default()
        };
        assert!(matches!(check_words(&config("", "A")), Err(SpawnError::NoCommand)));
        assert!(matches!(check_words(&config("a\0b", "A")), Err(SpawnError::Nul)));
        assert!(matches!(check_words(&config("a", "A=B")), Err(SpawnError::EnvName { .. })));
        let missing = working_directory(&identity(), &user(), Some("not-here-4711")).unwrap_err();
        assert_eq!(missing.to_string(), "cwd '/tmp/not-here-4711' does not exist");
        let file = working_directory(&identity(), &user(), Some("/etc/passwd")).unwrap_err();
        assert_eq!(file.to_string(), "cwd '/etc/passwd' is not a directory");
    }
}
