//! The helper process: reads a request from standard input, does it, writes the answer to standard output.

use super::container::ColdStart;
use super::criu::lazy::{self, LazyPages};
use super::dump::Dump;
use super::nursery::{self, Role};
use super::prepare::Prepare;
use super::restore::Restore;
use super::undo::UndoDump;
use super::{AtWork, HelperStep, Later, Operation};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::ExitCode;

/// `stillbox runtime <verb>`. The calling process must have one thread and nothing else to do: it is changed for good.
///
/// The exit code is 0 whenever an answer was written, be it a failed step; what the step was is in the answer.
pub fn main(verb: &str, arguments: &[OsString]) -> ExitCode {
    match verb {
        nursery::VERB => match nursery::serve(arguments) {
            Ok(Role::Nursery) => ExitCode::SUCCESS,
            Ok(Role::Helper(verb)) => help(&verb, &[]),
            Err(error) => complain(verb, &error),
        },
        verb => help(verb, arguments),
    }
}

fn help(verb: &str, arguments: &[OsString]) -> ExitCode {
    let outcome = match verb {
        ColdStart::VERB => serve::<ColdStart>(),
        Restore::VERB => serve::<Restore>(),
        Dump::VERB => serve::<Dump>(),
        Prepare::VERB => serve::<Prepare>(),
        UndoDump::VERB => serve::<UndoDump>(),
        "lazy-pages" => match LazyPages::from_arguments(arguments) {
            Some(lazy) => return lazy::serve(&lazy),
            None => Err(io::Error::other("lazy-pages wants the CRIU and the work folder")),
        },
        other => Err(io::Error::other(format!("there is no runtime verb '{other}'"))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(verb, &error),
    }
}

fn complain(verb: &str, error: &io::Error) -> ExitCode {
    eprintln!("stillbox runtime {verb}: {error}");
    ExitCode::FAILURE
}

fn serve<O: Operation>() -> io::Result<()> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    if text.is_empty() {
        // The server has ended before it said what to do.
        return Ok(());
    }
    let operation: O = serde_json::from_str(&text)?;
    // Until this process ends.
    let _at_work = AtWork::begin(operation.folder())?;
    let mut later = Later::default();
    let answer: Result<O::Answer, HelperStep> = operation.run(&mut later);
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &answer)?;
    // The answer's end: the server does not wait for this process's.
    writeln!(stdout)?;
    stdout.flush()?;
    // Not at a lower priority: who comes next waits for the lock that this process still has.
    drop(later);
    Ok(())
}
