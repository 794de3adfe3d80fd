//! `stillbox hosts`: names for clients that cannot be told where this server is. Either lines in /etc/hosts, or the
//! server's own name server asked by the machine (resolver.rs); between two marks by which they are found and taken out.
//!
//! Names below `.localhost` need none of it where glibc knows them (libnss-myhostname, systemd-resolved). What /etc/hosts
//! cannot say is "everything below": there, ports of sandboxes are named one sandbox at a time.

mod resolver;

use super::Outcome;
use crate::config::Config;
use crate::doctor::HOSTS_FILE as FILE;
use crate::runtime::network::resolver::{BLOCK_BEGIN as BEGIN, BLOCK_END as END};
use clap::{Args, ValueEnum};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::process::ExitCode;

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
    /// Take the lines out again, wherever they were written
    #[arg(long)]
    remove: bool,
    /// Make this machine ask the server's own name server (dns.listen), which knows every name below the domain
    #[arg(long, requires = "install")]
    resolver: bool,
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
        resolver::remove()?;
        replace(FILE, &without_block(&present))?;
        println!("{FILE} has no names of this server any more");
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.resolver {
        return install_resolver(config, arguments);
    }
    let block = block(config, arguments);
    if arguments.install {
        replace(FILE, &(without_block(&present) + &block))?;
        println!("{FILE} leads these names to this machine until `stillbox hosts --remove`:");
    }
    print!("{block}");
    hint_at_port(config, arguments);
    Ok(ExitCode::SUCCESS)
}

fn install_resolver(config: &Config, arguments: &HostsArguments) -> Outcome {
    let domain = config.domain_name();
    let ports = arguments.sandboxes.iter().flat_map(|id| SANDBOX_PORTS.map(|port| format!("{port}-{id}.{domain}")));
    let clouds = arguments.clouds.iter().flat_map(|cloud| cloud.names()).map(|name| (*name).to_owned());
    let names: Vec<String> = std::iter::once(format!("api.{domain}")).chain(ports).chain(clouds).collect();
    let written = resolver::install(config, &names)?;
    println!("{written} leads *.{domain} and what dns.names has to this machine until `stillbox hosts --remove`");
    hint_at_port(config, arguments);
    Ok(ExitCode::SUCCESS)
}

fn hint_at_port(config: &Config, arguments: &HostsArguments) {
    if !arguments.clouds.is_empty() && config.tls_listen.addresses.iter().all(|address| address.port().to_string() != HTTPS_PORT) {
        eprintln!("stillbox: a cloud's SDK asks on port {HTTPS_PORT}: start the server with --tls-listen localhost:{HTTPS_PORT}");
    }
}

fn block(config: &Config, arguments: &HostsArguments) -> String {
    let domain = config.domain_name();
    let own = [domain.to_owned(), format!("api.{domain}"), format!("sandbox.{domain}")];
    let clouds = arguments.clouds.iter().flat_map(|cloud| cloud.names()).map(|name| (*name).to_owned());
    let ports = arguments.sandboxes.iter().flat_map(|id| SANDBOX_PORTS.map(|port| format!("{port}-{id}.{domain}")));
    let names: Vec<String> = own.into_iter().chain(clouds).chain(ports).collect();
    let mut block = format!("{BEGIN}\n");
    for ip in config.tls_addresses() {
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
fn replace(path: &str, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(clouds: Vec<Cloud>) -> HostsArguments {
        HostsArguments { install: true, remove: false, resolver: false, clouds, sandboxes: vec!["i0".into()] }
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
