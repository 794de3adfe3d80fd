//! `stillbox template …`: the list is the server's; build, export and import work on the data folder's files, with or
//! without a server, and the next start of a server finds what they made.

use super::Outcome;
use super::client::Client;
use super::output::{Form, harmless, table};
use crate::config::Config;
use crate::model::ByteSize;
use crate::template::{Manifest, Recipe, archive, bootstrap};
use clap::Subcommand;
use serde::Deserialize;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        form: Form,
    },
    /// Make a built-in template ready in the data folder, from the cache or from Debian's packages
    Build {
        /// Its name
        #[arg(default_value = "base")]
        name: String,
    },
    /// Write a built-in template to one file, for machines without a network (made first if need be)
    Export {
        /// Its name
        name: String,
        /// The archive to write, a .tar.zst
        file: PathBuf,
    },
    /// Bring an exported template into the data folder
    Import {
        /// The archive
        file: PathBuf,
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
    match command {
        TemplateCommand::Ls { form } => list(&Client::new(config)?, form),
        TemplateCommand::Build { name } => {
            made(config, &name)?;
            Ok(ExitCode::SUCCESS)
        }
        TemplateCommand::Export { name, file } => {
            archive::export(&made(config, &name)?, &config.data_dir, &file)?;
            println!("{} ({})", file.display(), ByteSize(std::fs::metadata(&file)?.len()));
            Ok(ExitCode::SUCCESS)
        }
        TemplateCommand::Import { file } => {
            let archive::Imported { manifest, held } = archive::import(&file, &config.data_dir, config.template.limits)?;
            bootstrap::save(&manifest, &config.data_dir)?;
            drop(held);
            println!("template {} is in {}", harmless(&manifest.name), config.data_dir.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn made(config: &Config, name: &str) -> Result<Manifest, Box<dyn std::error::Error>> {
    let recipe = Recipe::built_in(name)?;
    Ok(bootstrap::ensure(&recipe, &config.template, &|line: &str| eprintln!("template: {line}"))?)
}

fn list(client: &Client, form: Form) -> Outcome {
    let rows: Vec<serde_json::Value> = client.get("/templates")?;
    if form.json {
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
