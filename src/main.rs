//! Parses the command line and hands over; every subcommand returns its exit code, so that guards run.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // The helper is no command for people: it gets everything by standard input, and its start counts in milliseconds.
    let mut words = std::env::args().skip(1);
    if let (Some("runtime"), Some(verb), None) = (words.next().as_deref(), words.next(), words.next()) {
        return stillbox::runtime::helper::main::main(&verb);
    }
    stillbox::cli::run(stillbox::cli::Arguments::parse())
}
