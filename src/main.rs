//! Parses the command line and hands over; every subcommand returns its exit code, so that guards run.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    stillbox::cli::run(stillbox::cli::Arguments::parse())
}
