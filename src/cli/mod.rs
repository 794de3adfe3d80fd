//! The command line. `serve` and `runtime` hand over to their rooms; everything else is a client of the API.

mod client;
mod demo;
mod disk;
mod env;
mod exec;
mod hosts;
mod novita;
mod output;
mod sandbox;
mod template;
mod volume;

use crate::config::{Config, ConfigErrors, Sources};
use crate::doctor::{self, Deep};
use crate::serve;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

pub use client::{Client, ClientError};
pub use novita::{NAME as NOVITA_NAME, NovitaArguments, run_novita};

/// Sandboxes for untrusted code on one Linux machine, for the E2B, Novita and HopX SDKs.
#[derive(Debug, Parser)]
#[command(name = "stillbox", version, max_term_width = 110)]
pub struct Arguments {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Command,
}

/// Settings common to all subcommands; the same names as in config/stillbox.toml.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Settings")]
struct Settings {
    /// Configuration file [default: $STILLBOX_CONFIG, else /etc/stillbox/stillbox.toml if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where all state lives [default: /var/lib/stillbox]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<String>,
    /// Plain HTTP address [default: localhost:3000]
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<String>,
    /// HTTPS address [default: localhost:3443]
    #[arg(long, global = true, value_name = "ADDRESS")]
    tls_listen: Option<String>,
    /// What sandboxes' URLs end in [default: stillbox.localhost with the port of tls_listen]
    #[arg(long, global = true, value_name = "DOMAIN")]
    domain: Option<String>,
    /// The key clients send [default: the one in the data folder]
    #[arg(long, global = true, value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Any other setting, e.g. --set sandbox.running_max=20
    #[arg(long = "set", global = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err("write KEY=VALUE".to_owned()),
    }
}

impl Settings {
    fn load(&self) -> Result<Config, ConfigErrors> {
        let named = [
            ("data_dir", &self.data_dir),
            ("listen", &self.listen),
            ("tls_listen", &self.tls_listen),
            ("domain", &self.domain),
            ("api_key", &self.api_key),
        ];
        let named = named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)));
        Config::load(&Sources::of_process(self.config.clone(), named.chain(self.set.iter().cloned()).collect()))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server until SIGTERM; sandboxes outlive it
    Serve {
        /// Base template made elsewhere by `make dist`: nothing is downloaded
        #[arg(long, value_name = "FILE")]
        template_archive: Option<PathBuf>,
    },
    /// Probe this machine for what the server needs
    Doctor {
        /// Also make, dump and restore a real sandbox
        #[arg(long)]
        deep: bool,
    },
    /// Show what a sandbox can do, on the running server
    Demo,
    /// Print the settings that an SDK needs, for eval "$(stillbox env)"
    Env(env::EnvArguments),
    /// Lead this server's names, and clouds' names on request, to this machine by /etc/hosts or its own name server
    Hosts(hosts::HostsArguments),
    /// List, create, use and end sandboxes
    #[command(subcommand, visible_alias = "sbx")]
    Sandbox(sandbox::SandboxCommand),
    /// Show what dumps and volumes take of the disk
    Df,
    /// Remove now what nothing needs: old rows, dumps without a sandbox or template
    Gc,
    /// List, make and remove volumes, storage that sandboxes share
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// List and build templates
    #[command(subcommand)]
    Template(template::TemplateCommand),
}

/// Runs the subcommand. Problems go to standard error, one line each; the code is 0 only when all went well.
pub fn run(arguments: Arguments) -> ExitCode {
    let config = match arguments.settings.load() {
        Ok(config) => config,
        Err(errors) => return report_config(&errors),
    };
    let outcome = match arguments.command {
        Command::Serve { template_archive } => {
            let mut config = config;
            config.template.archive = template_archive.or(config.template.archive);
            serve::run(config).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Command::Doctor { deep } => Ok(doctor::run(&config, if deep { Deep::Yes } else { Deep::No })),
        Command::Demo => demo::run(&config),
        Command::Env(arguments) => env::run(&config, &arguments),
        Command::Hosts(arguments) => hosts::run(&config, &arguments),
        Command::Df => disk::df(&config),
        Command::Gc => disk::gc(&config),
        Command::Sandbox(command) => sandbox::run(&config, command),
        Command::Volume(command) => volume::run(&config, command),
        Command::Template(command) => template::run(&config, command),
    };
    report(outcome)
}

/// All problems of the configuration, one line each.
fn report_config(errors: &ConfigErrors) -> ExitCode {
    for problem in &errors.0 {
        eprintln!("stillbox: {}: {}", problem.origin, problem.what);
    }
    ExitCode::from(2)
}

/// The exit code; what went wrong is told with its causes.
fn report(outcome: Outcome) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("stillbox: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        ExitCode::FAILURE
    })
}

/// What subcommands return: an exit code, or what went wrong in one line with its causes.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;
