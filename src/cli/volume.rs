//! `stillbox volume …`: a client of the server.

use super::Outcome;
use super::client::Client;
use super::output::{Form, table};
use crate::config::Config;
use crate::model::{ByteSize, VolumeId};
use clap::Subcommand;
use serde::Deserialize;
use serde_json::json;
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// List volumes
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        form: Form,
    },
    /// Make a volume
    Create {
        /// Its name: letters, digits, '_' and '-'
        name: String,
        /// Its size, e.g. "20 GiB" [default: volumes.size]
        #[arg(long)]
        size: Option<String>,
    },
    /// Remove volumes, with everything in them, that no sandbox and no snapshot has mounted
    #[command(visible_alias = "remove")]
    Rm {
        /// Names or ids
        #[arg(required = true)]
        volumes: Vec<String>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Volume {
    #[serde(rename = "volumeID")]
    volume_id: String,
    name: String,
    size_bytes: u64,
    used_bytes: u64,
    created_at: String,
}

/// Where all of them are told.
const PATH: &str = "/stillbox/volumes";

pub(super) fn run(config: &Config, command: VolumeCommand) -> Outcome {
    let client = Client::new(config)?;
    match command {
        VolumeCommand::Ls { form } => ls(&client, form),
        VolumeCommand::Create { name, size } => create(&client, &name, size.as_deref()),
        VolumeCommand::Rm { volumes } => rm(&client, &volumes),
    }
}

fn ls(client: &Client, form: Form) -> Outcome {
    if form.json {
        let volumes: serde_json::Value = client.get(PATH)?;
        println!("{volumes:#}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", listed(&client.get::<Vec<Volume>>(PATH)?));
    Ok(ExitCode::SUCCESS)
}

fn listed(volumes: &[Volume]) -> String {
    let row = |volume: &Volume| {
        let (size, used) = (ByteSize(volume.size_bytes).to_string(), ByteSize(volume.used_bytes).to_string());
        vec![volume.name.clone(), volume.volume_id.clone(), used, size, volume.created_at.clone()]
    };
    table(&["NAME", "VOLUME", "USED", "SIZE", "MADE"], &volumes.iter().map(row).collect::<Vec<_>>())
}

fn create(client: &Client, name: &str, size: Option<&str>) -> Outcome {
    let bytes = size.map(str::parse::<ByteSize>).transpose()?.map(ByteSize::bytes);
    let made: Volume = client.post(PATH, &json!({ "name": name, "sizeBytes": bytes }))?;
    println!("{}", made.volume_id);
    Ok(ExitCode::SUCCESS)
}

fn rm(client: &Client, asked: &[String]) -> Outcome {
    let known: Vec<Volume> = client.get(PATH)?;
    for volume in asked {
        let id = known.iter().find(|known| known.name == *volume || known.volume_id == *volume).map(|known| known.volume_id.clone());
        let id = id.or_else(|| volume.parse::<VolumeId>().ok().map(|id| id.to_string()));
        let id = id.ok_or_else(|| format!("there is no volume '{volume}'; `stillbox volume ls` lists them"))?;
        client.delete(&format!("/volumes/{id}"))?;
        println!("removed {volume}");
    }
    Ok(ExitCode::SUCCESS)
}

/// For `stillbox df`: what volumes take beside dumps. Nothing without any.
pub(super) fn taken(client: &Client) -> Result<Option<String>, Box<dyn std::error::Error>> {
    let volumes: Vec<Volume> = client.get(PATH)?;
    let used = volumes.iter().map(|volume| volume.used_bytes).sum();
    let told = || format!("\n{}\n{} in volumes, which gc leaves alone", listed(&volumes), ByteSize(used));
    Ok((!volumes.is_empty()).then(told))
}
