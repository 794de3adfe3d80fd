//! `novita-sandbox-cli`: the binary under this name takes the `sandbox` verbs of Novita's command line, with its words.
//!
//! A client of the same API as everything here, in Novita's dialect: its user agent says so.

use super::client::Client;
use super::output::{harmless, table};
use super::sandbox::segment;
use super::{ClientError, Outcome, report};
use crate::config::{Config, Sources};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

/// The name under which the binary is this program.
pub const NAME: &str = "novita-sandbox-cli";
/// Novita's way to tell a client; also the beginning of every SDK's.
const USER_AGENT: &str = concat!("novita-sandbox-cli/", env!("CARGO_PKG_VERSION"));
/// How often a followed list of metrics is asked for: as often as there is a new one.
const FOLLOW_EVERY: Duration = Duration::from_secs(2);

/// Novita's sandboxes on this machine: the sandbox commands of Novita's command line, for a Stillbox server.
#[derive(Debug, Parser)]
#[command(name = NAME, version, max_term_width = 110)]
pub struct NovitaArguments {
    #[command(flatten)]
    server: ServerArguments,
    #[command(subcommand)]
    command: TopCommand,
}

#[derive(Debug, Args)]
struct ServerArguments {
    /// The server's key [default: the one in the data folder]
    #[arg(long, global = true, env = "NOVITA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// The server's address [default: http://localhost:3000]
    #[arg(long, global = true, env = "NOVITA_API_URL")]
    api_url: Option<String>,
    /// How lists are printed
    #[arg(long, global = true, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
enum TopCommand {
    /// Work with sandboxes
    #[command(subcommand, visible_alias = "sbx")]
    Sandbox(SandboxVerb),
}

#[derive(Debug, Subcommand)]
enum SandboxVerb {
    /// Create a sandbox and print its id
    #[command(visible_alias = "cr")]
    Create {
        /// Template name or id
        #[arg(default_value = "base")]
        template: String,
        /// Seconds until it ends
        #[arg(short, long, default_value_t = 300)]
        timeout: u32,
        /// Metadata, e.g. --metadata user=42
        #[arg(long, value_name = "KEY=VALUE", value_parser = super::key_and_value)]
        metadata: Vec<(String, String)>,
    },
    /// List sandboxes, newest first
    #[command(visible_alias = "ls")]
    List {
        /// Only this state: running or paused
        #[arg(short, long)]
        state: Option<String>,
    },
    /// Show one sandbox
    Info {
        /// The sandbox
        id: String,
    },
    /// End sandboxes
    #[command(visible_alias = "kl")]
    Kill {
        /// The sandboxes
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// Every sandbox
        #[arg(short, long, conflicts_with = "ids")]
        all: bool,
    },
    /// Stop a sandbox's time
    Pause {
        /// The sandbox
        id: String,
    },
    /// Let a paused sandbox go on
    Resume {
        /// The sandbox
        id: String,
        /// Seconds until it ends
        #[arg(short, long, default_value_t = 300)]
        timeout: u32,
    },
    /// Show what a sandbox logged
    Logs {
        /// The sandbox
        id: String,
    },
    /// Show what a sandbox used over time
    Metrics {
        /// The sandbox
        id: String,
        /// Go on showing new ones
        #[arg(short, long)]
        follow: bool,
    },
    /// Copy a sandbox with its memory; prints the copies' ids
    Clone {
        /// The sandbox
        id: String,
        /// How many copies
        #[arg(short, long, default_value_t = 1)]
        count: u32,
        /// All or none of them
        #[arg(short, long)]
        strict: bool,
        /// Seconds until they end [default: the sandbox's own]
        #[arg(short, long)]
        timeout: Option<u32>,
    },
    /// Store a copy of a sandbox as a template; prints its id
    Commit {
        /// The sandbox
        id: String,
        /// The template's name
        #[arg(long)]
        alias: Option<String>,
    },
}

/// Runs the command. The code is 0 only when all went well.
pub fn run_novita(arguments: NovitaArguments) -> ExitCode {
    let flags = arguments.server.api_key.iter().map(|key| ("api_key".to_owned(), key.clone())).collect();
    let config = match Config::load(&Sources::of_process(None, flags)) {
        Ok(config) => config,
        Err(errors) => return super::report_config(&errors),
    };
    report(connect(&config, &arguments.server).map_err(Into::into).and_then(|client| {
        let TopCommand::Sandbox(verb) = arguments.command;
        run(&client, verb, arguments.server.output)
    }))
}

fn connect(config: &Config, server: &ServerArguments) -> Result<Client, ClientError> {
    let client = Client::new(config)?.named(USER_AGENT);
    Ok(match &server.api_url {
        Some(url) => client.at(url),
        None => client,
    })
}

fn run(client: &Client, verb: SandboxVerb, output: Output) -> Outcome {
    match verb {
        SandboxVerb::Create { template, timeout, metadata } => {
            let metadata: BTreeMap<_, _> = metadata.into_iter().collect();
            let body = json!({ "templateID": template, "timeout": timeout, "secure": true, "metadata": metadata });
            let made: Value = client.post("/sandboxes", &body)?;
            print_id(&made["sandboxID"]);
        }
        SandboxVerb::List { state } => {
            let query = state.map(|state| format!("&state={}", segment(&state))).unwrap_or_default();
            let rows: Vec<Value> = client.all(&format!("/v2/sandboxes?limit=100{query}"))?;
            show(output, &["SANDBOX", "TEMPLATE", "STATE", "STARTED", "ENDS"], &rows, |row| {
                [&row["sandboxID"], row.get("alias").unwrap_or(&row["templateID"]), &row["state"], &row["startedAt"], &row["endAt"]]
                    .map(text)
                    .to_vec()
            })?;
        }
        SandboxVerb::Info { id } => {
            println!("{}", serde_json::to_string_pretty(&client.get::<Value>(&call(&id, ""))?)?);
        }
        SandboxVerb::Kill { ids, all } => return kill(client, if all { all_ids(client)? } else { ids }),
        SandboxVerb::Pause { id } => {
            client.post_empty(&call(&id, "/pause"), &json!({}))?;
            println!("{id}");
        }
        SandboxVerb::Resume { id, timeout } => {
            client.post_empty(&call(&id, "/connect"), &json!({ "timeout": timeout }))?;
            println!("{id}");
        }
        SandboxVerb::Logs { id } => {
            let logs: Value = client.get(&format!("/v2{}?direction=forward", call(&id, "/logs")))?;
            let rows = logs["logs"].as_array().cloned().unwrap_or_default();
            show(output, &["TIME", "LEVEL", "MESSAGE"], &rows, |row| {
                [&row["timestamp"], &row["level"], &row["message"]].map(text).to_vec()
            })?;
        }
        SandboxVerb::Metrics { id, follow } => {
            let seen = metrics(client, &id, output)?;
            if follow {
                follow_metrics(client, &id, seen)?;
            }
        }
        SandboxVerb::Clone { id, count, strict, timeout } => {
            let body = json!({ "count": count, "strict": strict, "timeout": timeout });
            let made: Value = client.post(&call(&id, "/clone"), &body)?;
            let copies = made["sandboxes"].as_array().map_or(&[][..], Vec::as_slice);
            copies.iter().for_each(|copy| print_id(&copy["sandboxID"]));
            if copies.len() < usize::try_from(count).unwrap_or(usize::MAX) {
                eprintln!("{NAME}: {} of {count} copies were made", copies.len());
                return Ok(ExitCode::FAILURE);
            }
        }
        SandboxVerb::Commit { id, alias } => {
            let made: Value = client.post(&call(&id, "/commit"), &json!({ "alias": alias }))?;
            print_id(&made["templateID"]);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A call on one sandbox.
fn call(id: &str, verb: &str) -> String {
    format!("/sandboxes/{}{verb}", segment(id))
}

fn text(value: &Value) -> String {
    harmless(value.as_str().unwrap_or_default())
}

fn print_id(value: &Value) {
    println!("{}", text(value));
}

fn show(output: Output, header: &[&str], rows: &[Value], cells: impl Fn(&Value) -> Vec<String>) -> Result<(), serde_json::Error> {
    match output {
        Output::Table => println!("{}", table(header, &rows.iter().map(cells).collect::<Vec<_>>())),
        Output::Json => println!("{}", serde_json::to_string_pretty(rows)?),
    }
    Ok(())
}

/// Shows what there is; how many that were.
fn metrics(client: &Client, id: &str, output: Output) -> Result<usize, Box<dyn std::error::Error>> {
    let points: Vec<Value> = client.get(&call(id, "/metrics"))?;
    show(output, &["TIME", "CPU", "MEMORY", "DISK"], &points, metric_cells)?;
    Ok(points.len())
}

/// Shows new ones until the sandbox is gone or somebody ends the program.
fn follow_metrics(client: &Client, id: &str, mut seen: usize) -> Result<(), ClientError> {
    loop {
        std::thread::sleep(FOLLOW_EVERY);
        let points: Vec<Value> = client.get(&call(id, "/metrics"))?;
        for point in points.iter().skip(seen) {
            println!("{}", metric_cells(point).join("  "));
        }
        seen = points.len();
    }
}

fn metric_cells(point: &Value) -> Vec<String> {
    let mib = |name: &str| point[name].as_u64().unwrap_or(0);
    let disk = |name: &str| point[name].as_u64().unwrap_or(0) >> 20;
    vec![
        text(&point["timestamp"]),
        format!("{:.2} % of {}", point["cpuUsedPct"].as_f64().unwrap_or(0.0), point["cpuCount"]),
        format!("{} of {} MiB", mib("memUsedMiB"), mib("memTotalMiB")),
        format!("{} of {} MiB", disk("diskUsed"), disk("diskTotal")),
    ]
}

fn all_ids(client: &Client) -> Result<Vec<String>, ClientError> {
    let rows: Vec<Value> = client.all("/v2/sandboxes?limit=100")?;
    Ok(rows.iter().map(|row| text(&row["sandboxID"])).collect())
}

fn kill(client: &Client, ids: Vec<String>) -> Outcome {
    let mut code = ExitCode::SUCCESS;
    for id in ids {
        match client.delete(&call(&id, "")) {
            Ok(()) => println!("{id}"),
            Err(error) => {
                eprintln!("{NAME}: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
