//! `stillbox sandbox …`

use super::client::{Client, Target};
use super::output::{Form, harmless, table};
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
        #[command(flatten)]
        form: Form,
    },
    /// Create a sandbox and print its id
    Create(CreateArguments),
    /// Run a command in a sandbox; its exit code becomes ours
    Exec(exec::ExecArguments),
    /// Show one sandbox
    Info {
        /// The sandbox
        id: String,
        #[command(flatten)]
        form: Form,
    },
    /// Stop a sandbox's time: memory, processes and files are kept
    Pause {
        /// The sandbox
        id: String,
        /// Keep its files only; resume is a cold boot
        #[arg(long)]
        files_only: bool,
    },
    /// Let a paused sandbox go on
    Resume {
        /// The sandbox
        id: String,
        /// Seconds until it ends
        #[arg(long, default_value_t = 300)]
        timeout: u32,
        /// Boot it cold from its files; what was in its memory is lost
        #[arg(long)]
        files_only: bool,
    },
    /// Copy a running sandbox with its memory; prints the copies' ids
    Fork {
        /// The sandbox
        id: String,
        /// How many copies
        #[arg(short = 'n', long, default_value_t = 1)]
        count: u32,
        /// Seconds until they end
        #[arg(long, default_value_t = 300)]
        timeout: u32,
    },
    /// Tell what would keep a sandbox from being paused
    Explain {
        /// The sandbox
        id: String,
    },
    /// Show what a sandbox used over time
    Metrics {
        /// The sandbox
        id: String,
        #[command(flatten)]
        form: Form,
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
    lifecycle: Option<Lifecycle>,
    #[serde(default)]
    volume_mounts: Vec<VolumeMount>,
}

#[derive(Debug, Deserialize)]
struct VolumeMount {
    name: String,
    path: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lifecycle {
    on_timeout: String,
    #[serde(default)]
    auto_resume: bool,
}

impl Lifecycle {
    /// What follows the end of its time, after the time.
    fn told(&self) -> &'static str {
        match (self.on_timeout.as_str(), self.auto_resume) {
            ("pause", true) => ", then it is paused until a request wakes it",
            ("pause", false) => ", then it is paused",
            _ => "",
        }
    }
}

impl Sandbox {
    /// Whether it is paused and a request would not wake it.
    fn is_asleep(&self) -> bool {
        self.state == "paused" && !self.lifecycle.as_ref().is_some_and(|lifecycle| lifecycle.auto_resume)
    }
}

pub(super) fn run(config: &Config, command: SandboxCommand) -> Outcome {
    let client = Client::new(config)?;
    match command {
        SandboxCommand::Ls { state, form } => list(&client, state.as_deref(), form),
        SandboxCommand::Create(arguments) => create(&client, &arguments),
        SandboxCommand::Exec(arguments) => {
            let sandbox: Sandbox = client.get(&format!("/sandboxes/{}", segment(&arguments.id)))?;
            if sandbox.is_asleep() {
                return Err(format!("sandbox {0} is paused; `stillbox sandbox resume {0}` lets it go on", sandbox.sandbox_id).into());
            }
            let target = Target { id: arguments.id.clone(), token: sandbox.envd_access_token, user: arguments.user.clone() };
            exec::run(&client, &target, &arguments)
        }
        SandboxCommand::Info { id, form } => info(&client, &id, form),
        SandboxCommand::Pause { id, files_only } => {
            client.post_empty(&call(&id, "/pause"), &serde_json::json!({ "memory": !files_only }))?;
            println!("{id}");
            Ok(ExitCode::SUCCESS)
        }
        SandboxCommand::Resume { id, timeout, files_only } => {
            client.post_empty(&call(&id, "/connect"), &serde_json::json!({ "timeout": timeout, "memory": !files_only }))?;
            println!("{id}");
            Ok(ExitCode::SUCCESS)
        }
        SandboxCommand::Fork { id, count, timeout } => fork(&client, &id, count, timeout),
        SandboxCommand::Explain { id } => explain(&client, &id),
        SandboxCommand::Metrics { id, form } => metrics(&client, &id, form),
        SandboxCommand::Kill { ids, all: false } => kill(&client, ids),
        SandboxCommand::Kill { all: true, .. } => kill(&client, all_ids(&client)?),
    }
}

/// A call on one sandbox.
fn call(id: &str, verb: &str) -> String {
    format!("/sandboxes/{}{verb}", segment(id))
}

/// One path segment: everything but the unreserved characters percent-encoded.
pub(super) fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

fn list(client: &Client, state: Option<&str>, form: Form) -> Outcome {
    let state = state.map(|state| format!("&state={}", segment(state))).unwrap_or_default();
    let rows: Vec<serde_json::Value> = client.all(&format!("/v2/sandboxes?limit=100{state}"))?;
    if form.json {
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

fn fork(client: &Client, id: &str, count: u32, timeout: u32) -> Outcome {
    let body = serde_json::json!({ "count": count, "timeout": timeout });
    let copies: Vec<serde_json::Value> = client.post(&call(id, "/fork"), &body)?;
    let mut code = ExitCode::SUCCESS;
    for copy in copies {
        match copy["sandbox"]["sandboxID"].as_str() {
            Some(id) => println!("{id}"),
            None => {
                eprintln!("stillbox: a copy failed: {}", harmless(copy["error"]["message"].as_str().unwrap_or("no reason given")));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn explain(client: &Client, id: &str) -> Outcome {
    #[derive(Deserialize)]
    struct Finding {
        pid: i32,
        command: String,
        reason: String,
    }
    #[derive(Deserialize)]
    struct Findings {
        findings: Vec<Finding>,
    }
    let found: Findings = client.get(&format!("/stillbox/sandboxes/{}/findings", segment(id)))?;
    if found.findings.is_empty() {
        println!("nothing keeps {id} from being paused");
        return Ok(ExitCode::SUCCESS);
    }
    let rows =
        found.findings.into_iter().map(|finding| vec![finding.pid.to_string(), harmless(&finding.command), harmless(&finding.reason)]);
    println!("{}", table(&["PID", "COMMAND", "REASON"], &rows.collect::<Vec<_>>()));
    Ok(ExitCode::FAILURE)
}

fn metrics(client: &Client, id: &str, form: Form) -> Outcome {
    let points: Vec<serde_json::Value> = client.get(&call(id, "/metrics"))?;
    if form.json {
        println!("{}", serde_json::to_string_pretty(&points)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mib = |value: &serde_json::Value| format!("{} MiB", value.as_u64().unwrap_or(0) >> 20);
    let rows = points.iter().map(|point| {
        vec![
            point["timestamp"].as_str().unwrap_or("").to_owned(),
            format!("{:.2} % of {}", point["cpuUsedPct"].as_f64().unwrap_or(0.0), point["cpuCount"]),
            format!("{} of {}", mib(&point["memUsed"]), mib(&point["memTotal"])),
            format!("{} of {}", mib(&point["diskUsed"]), mib(&point["diskTotal"])),
        ]
    });
    println!("{}", table(&["TIME", "CPU", "MEMORY", "DISK"], &rows.collect::<Vec<_>>()));
    Ok(ExitCode::SUCCESS)
}

fn info(client: &Client, id: &str, form: Form) -> Outcome {
    let mut value: serde_json::Value = client.get(&call(id, ""))?;
    let inside: serde_json::Value = client.get(&format!("/stillbox/sandboxes/{}", segment(id)))?;
    if form.json {
        value["stillbox"] = inside;
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
    println!("ends       {}{}", sandbox.end_at, sandbox.lifecycle.map(|lifecycle| lifecycle.told()).unwrap_or_default());
    println!("limits     {} CPUs, {} MiB memory, {} MiB disk", sandbox.cpu_count, sandbox.memory_mb, sandbox.disk_size_mb);
    println!("metadata   {}", harmless(&metadata.join(" ")));
    for mount in sandbox.volume_mounts {
        println!("volume     {} at {}", harmless(&mount.name), harmless(&mount.path));
    }
    match (&inside["initPid"], &inside["dump"]) {
        (serde_json::Value::Number(pid), _) => println!("first pid  {pid} on the host"),
        (_, serde_json::Value::Object(dump)) => println!(
            "dump       {} MiB, {}",
            dump["memoryBytes"].as_u64().unwrap_or(0) >> 20,
            if dump["synced"] == true { "safe against power loss" } else { "not yet safe against power loss" }
        ),
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn all_ids(client: &Client) -> Result<Vec<String>, super::ClientError> {
    Ok(client.all::<Sandbox>("/v2/sandboxes?limit=100")?.into_iter().map(|sandbox| sandbox.sandbox_id).collect())
}

fn kill(client: &Client, ids: Vec<String>) -> Outcome {
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
