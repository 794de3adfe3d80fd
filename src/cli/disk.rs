//! `stillbox df` and `stillbox gc`: what dumps take of the disk, and giving back what nothing needs.

use super::Outcome;
use super::client::Client;
use super::output::{harmless, table};
use crate::config::Config;
use crate::model::ByteSize;
use serde::Deserialize;
use std::process::ExitCode;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Disk {
    dumps: Vec<Dump>,
    used_bytes: u64,
    limit_bytes: u64,
    host: Option<Host>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Host {
    path: String,
    free_bytes: u64,
    floor_bytes: u64,
    is_low: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Dump {
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    kept_for: Option<String>,
    memory_bytes: u64,
    disk_bytes: u64,
    created_at: String,
    synced: bool,
}

pub(super) fn df(config: &Config) -> Outcome {
    let client = Client::new(config)?;
    let disk: Disk = client.get("/stillbox/disk")?;
    let rows: Vec<Vec<String>> = disk
        .dumps
        .iter()
        .map(|dump| {
            vec![
                dump.snapshot_id.clone(),
                dump.kept_for.as_deref().map_or_else(|| "nothing any more".to_owned(), harmless),
                ByteSize(dump.memory_bytes).to_string(),
                ByteSize(dump.disk_bytes).to_string(),
                dump.created_at.clone(),
                if dump.synced { "yes" } else { "not yet" }.to_owned(),
            ]
        })
        .collect();
    println!("{}", table(&["DUMP", "KEPT FOR", "MEMORY", "DISK", "TAKEN", "SYNCED"], &rows));
    println!("{} of {} (snapshots.disk_bytes_max)", ByteSize(disk.used_bytes), ByteSize(disk.limit_bytes));
    if let Some(volumes) = super::volume::taken(&client)? {
        println!("{volumes}");
    }
    if let Some(host) = &disk.host {
        let (free, floor) = (ByteSize(host.free_bytes), ByteSize(host.floor_bytes));
        println!("{free} free below {}; {floor} are kept free (runtime.disk_free_min)", host.path);
        if host.is_low {
            println!("too little: nothing is started, resumed or dumped, and running sandboxes find their disks full");
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn gc(config: &Config) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Freed {
        freed_bytes: u64,
    }
    let freed: Freed = Client::new(config)?.post("/stillbox/disk/gc", &serde_json::json!({}))?;
    println!("{} given back", ByteSize(freed.freed_bytes));
    Ok(ExitCode::SUCCESS)
}
