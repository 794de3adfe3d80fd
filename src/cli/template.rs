//! `stillbox template …`: a client of the server, but for what is made of files in the data folder (built-in templates,
//! archives), which works without one.

mod build;
mod context;

use super::Outcome;
use super::client::{Client, ClientError};
use super::output::{Form, harmless, table};
use crate::config::Config;
use crate::model::ByteSize;
use crate::template::image::{self, Reference};
use crate::template::{Manifest, Recipe, archive, bootstrap, recipe};
use clap::Subcommand;
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        form: Form,
    },
    /// Build a folder with a Dockerfile, or make a built-in template ready in the data folder
    Build {
        /// The folder, or a built-in template's name
        #[arg(default_value = "base", value_name = "DIR|NAME")]
        what: String,
        #[command(flatten)]
        arguments: build::BuildArguments,
    },
    /// Show the log of a build, until its end
    Logs {
        /// The template's name or id
        template: String,
        /// A build's id [default: the newest]
        build: Option<String>,
    },
    /// Remove templates that no sandbox uses
    #[command(visible_alias = "remove")]
    Rm {
        /// Names or ids
        #[arg(required = true)]
        templates: Vec<String>,
    },
    /// Write a template to one file, for other machines (a built-in one is made first if need be)
    Export {
        /// Its name, or name:tag
        name: String,
        /// The archive to write, a .tar.zst
        file: PathBuf,
    },
    /// Make a template of an exported one, an OCI layout or a `docker save` archive
    Import {
        /// The file, or the folder of an OCI layout
        file: PathBuf,
        /// Name of the template [default: the one in the file]
        #[arg(long)]
        name: Option<String>,
        /// Which image, when the file has several; and the name that builds may use as FROM
        #[arg(long)]
        image: Option<Reference>,
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
        TemplateCommand::Build { what, arguments } => match is_built_in(&what) && arguments.file.is_none() {
            true => make_built_in(config, &what),
            false => build::run(&Client::new(config)?, Path::new(&what), &arguments),
        },
        TemplateCommand::Logs { template, build } => build::logs(&Client::new(config)?, &template, build.as_deref()),
        TemplateCommand::Rm { templates } => remove(&Client::new(config)?, &templates),
        TemplateCommand::Export { name, file } => export(config, &name, &file),
        TemplateCommand::Import { file, name, image } => import(config, &file, name, image.as_ref()),
    }
}

fn is_built_in(name: &str) -> bool {
    recipe::built_in_names().iter().any(|known| known == name)
}

fn made(config: &Config, name: &str) -> Result<Manifest, Box<dyn std::error::Error>> {
    let recipe = Recipe::built_in(name)?;
    Ok(bootstrap::ensure(&recipe, &config.template, &|line: &str| eprintln!("template: {line}"))?)
}

/// A server that runs is told, so that it lists the template from now on; another finds it when it starts.
fn make_built_in(config: &Config, name: &str) -> Outcome {
    let manifest = made(config, name)?;
    match Client::new(config).and_then(|client| client.post_empty("/stillbox/templates", &json!(manifest))) {
        Ok(()) | Err(ClientError::Unreachable { .. } | ClientError::NoKey { .. }) => {}
        // It is made all the same: whose server this is, and whether it wants to know, does not change that.
        Err(error) => eprintln!("template: the server at {} was not told: {error}", config.listen),
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(client: &Client, templates: &[String]) -> Outcome {
    for template in templates {
        client.delete(&format!("/templates/{}", escaped(template)))?;
        println!("{}", harmless(template));
    }
    Ok(ExitCode::SUCCESS)
}

/// The id behind a name.
fn id_of(client: &Client, name: &str) -> Result<String, ClientError> {
    #[derive(Deserialize)]
    struct Alias {
        #[serde(rename = "templateID")]
        template_id: String,
    }
    let alias: Alias = client.get(&format!("/templates/aliases/{}", escaped(name)))?;
    Ok(alias.template_id)
}

/// As one segment of a path.
fn escaped(name: &str) -> String {
    percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// A built-in template needs no server; of any other, the server knows the layers.
fn export(config: &Config, name: &str, file: &Path) -> Outcome {
    let manifest = match is_built_in(name) {
        true => made(config, name)?,
        false => Client::new(config)?.get(&format!("/stillbox/templates/{}/manifest", escaped(name)))?,
    };
    archive::export(&manifest, &config.data_dir, file)?;
    println!("{} ({})", file.display(), ByteSize(std::fs::metadata(file)?.len()));
    Ok(ExitCode::SUCCESS)
}

fn import(config: &Config, file: &Path, name: Option<String>, wanted: Option<&Reference>) -> Outcome {
    let imported = match file.is_dir() {
        true => None,
        // An archive of ours says so in its first entry; whatever else it is, the other reader knows better.
        false => match archive::import(file, &config.data_dir, config.template.limits) {
            Ok(imported) => Some(imported),
            Err(archive::ArchiveError::Form { .. } | archive::ArchiveError::File { doing: "read", .. }) => None,
            Err(error) => return Err(error.into()),
        },
    };
    match imported {
        Some(imported) => adopt(config, imported, name),
        None => import_image(config, file, name, wanted),
    }
}

/// Built-in templates are also found by the next start of a server; the running one is told.
fn adopt(config: &Config, imported: archive::Imported, name: Option<String>) -> Outcome {
    let archive::Imported { mut manifest, held } = imported;
    manifest.name = name.unwrap_or(manifest.name);
    let told = Client::new(config).and_then(|client| client.post_empty("/stillbox/templates", &json!(manifest)));
    match told {
        Ok(()) => println!("template {} is here", harmless(&manifest.name)),
        Err(ClientError::Unreachable { .. } | ClientError::NoKey { .. }) if is_built_in(&manifest.name) => {
            bootstrap::save(&manifest, &config.data_dir)?;
            println!("template {} is in {}", harmless(&manifest.name), config.data_dir.display());
        }
        Err(error) => return Err(error.into()),
    }
    drop(held);
    Ok(ExitCode::SUCCESS)
}

/// The image's layers come into the data folder; the server makes a template of them as of any other image.
fn import_image(config: &Config, file: &Path, name: Option<String>, wanted: Option<&Reference>) -> Outcome {
    let client = Client::new(config)?;
    let reference = image::import(&config.template, file, wanted, &|line| println!("   {}", harmless(line)))?;
    let name = name.unwrap_or_else(|| reference.repository.rsplit('/').next().unwrap_or("image").replace('.', "-"));
    build::of_image(&client, &name, &reference.to_string())
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
    println!("{}", table(&["TEMPLATE", "NAMES", "BUILD", "LIMITS", "CREATED", "SANDBOXES MADE"], &cells));
    Ok(ExitCode::SUCCESS)
}
