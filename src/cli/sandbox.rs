//! `stillbox sandbox …`

use super::client::{Client, Target};
use super::output::{harmless, table};
use super::{Outcome, exec};
use crate::config::Config;
use clap::{Args, Subcommand};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(super) enum SandboxCommand {
    /// List sandboxes, newest first
    #[command(visible_alias = "list")]
    Ls {
        /// Only this state: running or paused
        #[arg(long)]
        state: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Create a sandbox and print its id
    Create(CreateArguments),
    /// Run a command in a sandbox; its exit code becomes ours
    Exec(exec::ExecArguments),
    /// Show one sandbox
    Info {
        /// The sandbox
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// End sandboxes and remove their files
    Kill {
        /// The sandboxes
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// Every sandbox of this server
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct CreateArguments {
    /// Template name or id, with an optional :tag
    #[arg(default_value = "base")]
    template: String,
    /// Seconds until it ends
    #[arg(long, default_value_t = 300)]
    timeout: u32,
    /// Environment, e.g. --env A=1
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = super::key_and_value)]
    env: Vec<(String, String)>,
    /// Searchable text, e.g. --metadata user=42
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::key_and_value)]
    metadata: Vec<(String, String)>,
    /// No connections to the outside
    #[arg(long)]
    no_internet: bool,
}

/// The part of E2B's SandboxDetail and ListedSandbox that is shown.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sandbox {
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "templateID")]
    template_id: String,
    alias: Option<String>,
    state: String,
    started_at: String,
    end_at: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
    envd_access_token: Option<String>,
}

pub(super) fn run(config: &Config, command: SandboxCommand) -> Outcome {
    let client = Client::new(config)?;
    match command {
        SandboxCommand::Ls { state, json } => list(&client, state.as_deref(), json),
        SandboxCommand::Create(arguments) => create(&client, &arguments),
        SandboxCommand::Exec(arguments) => {
            let token = token_of(&client, &arguments.id)?;
            let target = Target { id: arguments.id.clone(), token, user: arguments.user.clone() };
            exec::run(&client, &target, &arguments)
        }
        SandboxCommand::Info { id, json } => info(&client, &id, json),
        SandboxCommand::Kill { ids, all } => kill(&client, ids, all),
    }
}

/// What an agent wants to hear from callers.
fn token_of(client: &Client, id: &str) -> Result<Option<String>, super::ClientError> {
    Ok(client.get::<Sandbox>(&format!("/sandboxes/{}", segment(id)))?.envd_access_token)
}

/// One path segment: everything but the unreserved characters percent-encoded.
pub(super) fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

fn list(client: &Client, state: Option<&str>, json: bool) -> Outcome {
    let query = state.map(|state| format!("?state={}", segment(state))).unwrap_or_default();
    let rows: Vec<serde_json::Value> = client.get(&format!("/v2/sandboxes{query}"))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut cells = Vec::new();
    for row in rows {
        let row: Sandbox = serde_json::from_value(row)?;
        let metadata = row.metadata.unwrap_or_default();
        let metadata: Vec<String> = metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
        cells.push(vec![
            row.sandbox_id,
            harmless(&row.alias.unwrap_or(row.template_id)),
            row.state,
            row.started_at,
            row.end_at,
            harmless(&metadata.join(" ")),
        ]);
    }
    println!("{}", table(&["SANDBOX", "TEMPLATE", "STATE", "STARTED", "ENDS", "METADATA"], &cells));
    Ok(ExitCode::SUCCESS)
}

fn create(client: &Client, arguments: &CreateArguments) -> Outcome {
    #[derive(Deserialize)]
    struct Created {
        #[serde(rename = "sandboxID")]
        sandbox_id: String,
    }
    let body = serde_json::json!({
        "templateID": arguments.template,
        "timeout": arguments.timeout,
        "secure": true,
        "allow_internet_access": !arguments.no_internet,
        "envVars": arguments.env.iter().cloned().collect::<BTreeMap<_, _>>(),
        "metadata": arguments.metadata.iter().cloned().collect::<BTreeMap<_, _>>(),
    });
    let created: Created = client.post("/sandboxes", &body)?;
    println!("{}", created.sandbox_id);
    Ok(ExitCode::SUCCESS)
}

fn info(client: &Client, id: &str, json: bool) -> Outcome {
    let value: serde_json::Value = client.get(&format!("/sandboxes/{}", segment(id)))?;
    if json {
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(ExitCode::SUCCESS);
    }
    let sandbox: Sandbox = serde_json::from_value(value)?;
    let metadata = sandbox.metadata.unwrap_or_default();
    let metadata: Vec<String> = metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
    println!("sandbox    {}", sandbox.sandbox_id);
    println!("template   {} ({})", harmless(&sandbox.alias.unwrap_or_default()), sandbox.template_id);
    println!("state      {}", sandbox.state);
    println!("started    {}", sandbox.started_at);
    println!("ends       {}", sandbox.end_at);
    println!("limits     {} CPUs, {} MiB memory, {} MiB disk", sandbox.cpu_count, sandbox.memory_mb, sandbox.disk_size_mb);
    println!("metadata   {}", harmless(&metadata.join(" ")));
    Ok(ExitCode::SUCCESS)
}

fn kill(client: &Client, ids: Vec<String>, all: bool) -> Outcome {
    let ids = if all {
        client.get::<Vec<Sandbox>>("/v2/sandboxes")?.into_iter().map(|sandbox| sandbox.sandbox_id).collect()
    } else {
        ids
    };
    let mut code = ExitCode::SUCCESS;
    for id in ids {
        match client.delete(&format!("/sandboxes/{}", segment(&id))) {
            Ok(()) => println!("{id}"),
            Err(error) => {
                eprintln!("stillbox: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
