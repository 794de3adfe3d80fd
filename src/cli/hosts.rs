//! `stillbox hosts`: lines in /etc/hosts for clients that cannot be told where this server is, between two marks by which
//! they are found and taken out again.
//!
//! Names below `.localhost` need none of it where glibc knows them (libnss-myhostname, systemd-resolved). What /etc/hosts
//! cannot say is "everything below": ports of sandboxes are named one sandbox at a time.

use super::Outcome;
use crate::config::Config;
use crate::doctor::{HOSTS_BEGIN as BEGIN, HOSTS_FILE as FILE};
use clap::{Args, ValueEnum};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::process::ExitCode;

const END: &str = "# stillbox: end";
/// envd, the code interpreter, HopX's agent.
const SANDBOX_PORTS: [u16; 3] = [49983, 49999, 7777];
const HTTPS_PORT: &str = "443";

/// Whose fixed names lead here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Cloud {
    /// api.<Novita's domains>; sandboxes are then found below this server's own domain
    Novita,
    /// api.hopx.dev
    Hopx,
}

impl Cloud {
    const fn names(self) -> &'static [&'static str] {
        match self {
            Self::Novita => &["api.us-phx-1.sandbox.novita.ai", "api.sandbox.novita.ai"],
            Self::Hopx => &["api.hopx.dev"],
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct HostsArguments {
    /// Write the lines, replacing those of an earlier call
    #[arg(long, conflicts_with = "remove")]
    install: bool,
    /// Take the lines out again
    #[arg(long)]
    remove: bool,
    /// Also the fixed names of a cloud, for its SDK without any settings (the server must listen on port 443)
    #[arg(long = "sdk", value_enum, value_name = "CLOUD")]
    clouds: Vec<Cloud>,
    /// Also the ports of this sandbox that SDKs use
    #[arg(long = "sandbox", value_name = "ID")]
    sandboxes: Vec<String>,
}

pub(super) fn run(config: &Config, arguments: &HostsArguments) -> Outcome {
    let present = fs::read_to_string(FILE)?;
    if arguments.remove {
        replace(&without_block(&present))?;
        println!("{FILE} has no names of this server any more");
        return Ok(ExitCode::SUCCESS);
    }
    let block = block(config, arguments);
    if arguments.install {
        replace(&(without_block(&present) + &block))?;
        println!("{FILE} leads these names to this machine until `stillbox hosts --remove`:");
    }
    print!("{block}");
    if !arguments.clouds.is_empty() && config.tls_listen.addresses.iter().all(|address| address.port().to_string() != HTTPS_PORT) {
        eprintln!("stillbox: a cloud's SDK asks on port {HTTPS_PORT}: start the server with --tls-listen localhost:{HTTPS_PORT}");
    }
    Ok(ExitCode::SUCCESS)
}

fn block(config: &Config, arguments: &HostsArguments) -> String {
    let domain = config.domain_name();
    let own = [domain.to_owned(), format!("api.{domain}"), format!("sandbox.{domain}")];
    let clouds = arguments.clouds.iter().flat_map(|cloud| cloud.names()).map(|name| (*name).to_owned());
    let ports = arguments.sandboxes.iter().flat_map(|id| SANDBOX_PORTS.map(|port| format!("{port}-{id}.{domain}")));
    let names: Vec<String> = own.into_iter().chain(clouds).chain(ports).collect();
    let mut block = format!("{BEGIN}\n");
    for address in &config.tls_listen.addresses {
        let ip = match address.ip() {
            ip if ip.is_unspecified() && ip.is_ipv4() => "127.0.0.1".to_owned(),
            ip if ip.is_unspecified() => "::1".to_owned(),
            ip => ip.to_string(),
        };
        for name in &names {
            let _infallible = writeln!(block, "{ip} {name}");
        }
    }
    block + END + "\n"
}

/// The file as it was before the first call; its last line ended.
fn without_block(text: &str) -> String {
    let mut inside = false;
    let mut kept = String::with_capacity(text.len());
    for line in text.lines() {
        inside |= line == BEGIN;
        if !inside {
            kept.push_str(line);
            kept.push('\n');
        }
        inside &= line != END;
    }
    kept
}

/// In place: in containers the file is a mount of its own and cannot be renamed over.
fn replace(text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(FILE)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(clouds: Vec<Cloud>) -> HostsArguments {
        HostsArguments { install: true, remove: false, clouds, sandboxes: vec!["i0".into()] }
    }

    #[test]
    fn what_is_installed_is_taken_out_again_and_nothing_else() {
        let config = Config { domain: "box.test:3443".into(), ..Config::default() };
        let block = block(&config, &arguments(vec![Cloud::Hopx]));
        for name in ["127.0.0.1 api.box.test\n", "127.0.0.1 api.hopx.dev\n", "127.0.0.1 49983-i0.box.test\n", "::1 box.test\n"] {
            assert!(block.contains(name), "{block}");
        }
        let before = "127.0.0.1 localhost\n# mine\n";
        let once = without_block(before) + &block;
        assert_eq!(without_block(&once), before);
        assert_eq!(without_block(&(without_block(&once) + &block)), before);
        assert_eq!(without_block("no newline"), "no newline\n");
    }
}
