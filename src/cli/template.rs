//! `stillbox template …`

use super::Outcome;
use super::client::Client;
use super::output::{harmless, table};
use crate::config::Config;
use clap::Subcommand;
use serde::Deserialize;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// The part of E2B's template list item that is shown.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Template {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(default)]
    aliases: Vec<String>,
    build_status: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
    created_at: String,
    spawn_count: u64,
}

pub(super) fn run(config: &Config, command: TemplateCommand) -> Outcome {
    let client = Client::new(config)?;
    match command {
        TemplateCommand::Ls { json } => list(&client, json),
    }
}

fn list(client: &Client, json: bool) -> Outcome {
    let rows: Vec<serde_json::Value> = client.get("/templates")?;
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut cells = Vec::new();
    for row in rows {
        let row: Template = serde_json::from_value(row)?;
        cells.push(vec![
            row.template_id,
            harmless(&row.aliases.join(", ")),
            row.build_status,
            format!("{} CPUs, {} MiB", row.cpu_count, row.memory_mb),
            row.created_at,
            row.spawn_count.to_string(),
        ]);
    }
    println!("{}", table(&["TEMPLATE", "NAMES", "BUILD", "LIMITS", "CREATED", "SANDBOXES"], &cells));
    Ok(ExitCode::SUCCESS)
}
