//! Parses the command line and hands over; every subcommand returns its exit code, so that guards run.

use clap::Parser;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Root file systems are made with the modes that they say, whatever the caller's mask; what is private says so.
    nix::sys::stat::umask(nix::sys::stat::Mode::S_IWGRP | nix::sys::stat::Mode::S_IWOTH);
    // The helper is no command for people: it gets everything by standard input, and its start counts in milliseconds.
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [runtime, verb, arguments @ ..] = words.as_slice()
        && runtime == "runtime"
    {
        return stillbox::runtime::helper::main::main(&verb.to_string_lossy(), arguments);
    }
    end_quietly_without_a_reader();
    // A link of this name is Novita's command line.
    let called = std::env::args_os().next().unwrap_or_default();
    if Path::new(&called).file_name().is_some_and(|name| name == stillbox::cli::NOVITA_NAME) {
        return stillbox::cli::run_novita(stillbox::cli::NovitaArguments::parse());
    }
    stillbox::cli::run(stillbox::cli::Arguments::parse())
}

/// Who reads us through `head` has seen enough: `println!` panics then, which runs the guards, and needs no trace.
fn end_quietly_without_a_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if !(said.starts_with("failed printing to ") && said.contains("Broken pipe")) {
            usual(panic);
        }
    }));
}
