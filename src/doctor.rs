//! `stillbox doctor`: real probes of this machine, each `ok` or `FIX` with the next step.
//!
//! Every probe does the thing that the server will do, as far as that leaves no trace; none reads a version and hopes.
//! `--deep` makes a real sandbox from `base`, dumps it and restores it on a second copy of its disk (deep.rs).

mod deep;
mod names;
mod probes;

use crate::config::Config;
use std::fmt;
use std::process::ExitCode;

pub use deep::{DeepError, DeepReport};
pub use names::{HOSTS_FILE, RESOLVED_DROP_IN, is_resolved_in_charge};

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It works; what was seen.
    Fine(String),
    /// It works, and something about it should be known.
    Note(String),
    /// It does not work; what to do about it.
    Fix(String),
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was probed.
    pub name: &'static str,
    /// What was found.
    pub verdict: Verdict,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Fine(seen) => write!(f, "ok    {:<12} {seen}", self.name),
            Verdict::Note(seen) => write!(f, "note  {:<12} {seen}", self.name),
            Verdict::Fix(step) => write!(f, "FIX:  {:<12} {step}", self.name),
        }
    }
}

/// Runs all probes, printing each as it ends; the code is 1 when something must be fixed.
pub fn run(config: &Config, is_deep: Deep) -> ExitCode {
    let mut is_well = true;
    for probe in probes::ALL {
        let finding = Finding { name: probe.name, verdict: (probe.run)(config) };
        println!("{finding}");
        is_well &= !matches!(finding.verdict, Verdict::Fix(_));
    }
    if is_well && is_deep == Deep::Yes {
        match deep::run(config) {
            Ok(report) => println!("{report}"),
            Err(error) => {
                println!("FIX:  {:<12} {}", "deep", chain(&error));
                is_well = false;
            }
        }
    }
    if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether a real sandbox is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deep {
    /// Made, dumped, restored, removed.
    Yes,
    /// Probes only.
    No,
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
