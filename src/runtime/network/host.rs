//! The host's side: the subnet, the instance's table, forwarding, other people's FORWARD chains; and all of it undone.
//!
//! Instances on one host share one thing, `net.ipv4.ip_forward`. Who uses it, and that it was off before, is kept where
//! the switch is: in the host's netns, as chains of the nft table `stillbox`. So it survives kill -9 and not a reboot,
//! as the switch does. All functions block.

use super::foreign;
use super::nft::Transaction;
use super::rules::{self, Block, HostRules};
use super::slot::on_netlink;
use super::subnet::{self, AddressPlan, Taken};
use super::{NetworkConfig, NetworkError};
use crate::model::InstanceId;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Table that all instances of a host share.
const SHARED_TABLE: &str = "stillbox";
/// A chain of that name says that forwarding was off before the first instance came.
const WAS_OFF: &str = "forwarding_was_off";
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// Held while the shared table and the switch are looked at and changed.
const LOCK: &str = "/run/stillbox-network.lock";

/// What an instance holds of the host.
#[derive(Debug, Clone)]
pub(super) struct Host {
    instance: InstanceId,
    pub(super) addresses: AddressPlan,
    pub(super) mtu: u32,
    /// Private blocks that sandboxes may reach; `None`: all.
    pub(super) private_exceptions: Option<Vec<Block>>,
    /// Remembers the subnet, since running sandboxes have its addresses.
    subnet_file: PathBuf,
}

/// Whether slots of an earlier server exist, which pin its subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leftovers {
    Slots,
    None,
}

impl Host {
    /// Claims the subnet, writes the table, lets forwarded packets through. May be repeated over what is there.
    pub(super) fn open(config: &NetworkConfig, instance: InstanceId, pins: &Path, leftovers: Leftovers) -> Result<Self, NetworkError> {
        check_nft()?;
        let exceptions = parse_exceptions(config)?;
        let subnet_file = pins.join("subnet");
        let subnet = claim_subnet(config, instance, &subnet_file, leftovers)?;
        let mtu = on_netlink(async |handle| subnet::uplink_mtu(&handle).await).map_err(step("reading the uplink's MTU"))?;
        let private_exceptions = config.deny_private.then_some(exceptions);
        let host = Self { instance, addresses: AddressPlan { subnet }, mtu, private_exceptions, subnet_file };
        host.rules().transaction().apply().map_err(step("writing the host's nft table"))?;
        turn_forwarding_on(instance)?;
        foreign::open(instance).map_err(step("letting sandboxes through the host's FORWARD chains"))?;
        Ok(host)
    }

    fn rules(&self) -> HostRules<'_> {
        let private_exceptions = self.private_exceptions.as_deref();
        HostRules { instance: self.instance, subnet: self.addresses.subnet, private_exceptions }
    }

    /// Puts back what others have taken away since: reloading a firewall flushes every table, restarting Docker or ufw
    /// rewrites FORWARD, `sysctl --system` may turn forwarding off. Says whether anything was missing.
    pub(super) fn mend(&self) -> Result<bool, NetworkError> {
        let own = rules::table_name(self.instance);
        let chains = foreign::chains().map_err(step("reading the host's nft chains"))?;
        let lacks = |table: &str, name: &str| !chains.iter().any(|chain| chain.table == table && chain.name == name);
        let (lacks_table, lacks_share) = (lacks(&own, "forward"), lacks(SHARED_TABLE, &own));
        let lacks_way = !foreign::is_open(self.instance, &chains).map_err(step("reading the host's FORWARD chains"))?;
        let is_off = !is_forwarding().map_err(step("reading net.ipv4.ip_forward"))?;
        if lacks_table {
            self.rules().transaction().apply().map_err(step("writing the host's nft table"))?;
        }
        if lacks_share || is_off {
            turn_forwarding_on(self.instance)?;
        }
        if lacks_way {
            foreign::open(self.instance).map_err(step("letting sandboxes through the host's FORWARD chains"))?;
        }
        Ok(lacks_table || lacks_share || lacks_way || is_off)
    }

    /// Undoes all of [`Host::open`]. Goes on past failures and returns the first.
    pub(super) fn close(&self) -> io::Result<()> {
        let steps = [
            foreign::close(self.instance),
            turn_forwarding_off(self.instance),
            Transaction::without(&rules::table_name(self.instance)).apply(),
            on_netlink(async |handle| subnet::unclaim(&handle, self.addresses.subnet).await),
            std::fs::remove_file(&self.subnet_file),
        ];
        steps.into_iter().collect()
    }
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Step { step, source: source.into() }
}

/// The cheapest request that needs the program, the permission and the kernel's nf_tables.
fn check_nft() -> Result<(), NetworkError> {
    let problem = match Transaction::on(SHARED_TABLE).check() {
        Ok(()) => return Ok(()),
        Err(problem) => problem,
    };
    let (what, remedy) = match problem.kind() {
        io::ErrorKind::NotFound => ("nft is not installed", "install it, on Debian: apt-get install nftables"),
        io::ErrorKind::PermissionDenied => {
            ("nft may not change this machine's rules", "run as root with CAP_NET_ADMIN (in Docker: --privileged)")
        }
        _ => ("nft does not work on this machine", "try `nft list ruleset`; the kernel needs nf_tables"),
    };
    Err(NetworkError::Host { what: what.to_owned(), remedy: remedy.to_owned(), source: Some(problem.into()) })
}

fn parse_exceptions(config: &NetworkConfig) -> Result<Vec<Block>, NetworkError> {
    config.allow_private.iter().map(|text| parse_block("network.allow_private", text)).collect()
}

fn parse_block(key: &'static str, text: &str) -> Result<Block, NetworkError> {
    text.parse().map_err(|error: rules::ParseBlockError| NetworkError::Config { key, value: text.to_owned(), problem: error.to_string() })
}

/// The configured block, the one of last time, or the first free one.
fn claim_subnet(config: &NetworkConfig, instance: InstanceId, file: &Path, leftovers: Leftovers) -> Result<Block, NetworkError> {
    let remembered = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<Block>().ok());
    let configured = config.subnet.as_deref().map(parse_subnet).transpose()?;
    let subnet = on_netlink(async |handle| {
        if let (Some(subnet), Leftovers::Slots) = (remembered, leftovers) {
            return Ok(match subnet::claim(&handle, subnet).await {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error)?,
                _ => Ok(subnet),
            });
        }
        if let Some(subnet) = remembered {
            // Without slots a claim is only a leftover; it must not stand in the way of itself.
            subnet::unclaim(&handle, subnet).await?;
        }
        let mut taken = subnet::taken(&handle).await?;
        taken.push(subnet::inner_block(super::INNER_ADDRESS, super::INNER_PREFIX));
        match configured {
            Some(subnet) if !subnet::is_free(subnet, &taken) => Ok(Err(in_use(subnet, &taken))),
            Some(subnet) => subnet::claim(&handle, subnet).await.map(|()| Ok(subnet)),
            None => claim_free(&handle, instance, remembered, &taken).await,
        }
    });
    let subnet = subnet.map_err(step("claiming a subnet"))??;
    std::fs::write(file, format!("{subnet}\n")).map_err(step("remembering the subnet"))?;
    Ok(subnet)
}

fn parse_subnet(text: &str) -> Result<Block, NetworkError> {
    let subnet = parse_block("network.subnet", text)?;
    if !(8..=29).contains(&subnet.prefix()) {
        let problem = "has no room or too much; its prefix has to be 8 to 29".to_owned();
        return Err(NetworkError::Config { key: "network.subnet", value: text.to_owned(), problem });
    }
    Ok(subnet)
}

fn in_use(subnet: Block, taken: &[Taken]) -> NetworkError {
    let other = taken.iter().find(|other| other.block.overlaps(subnet)).map(|other| other.block.to_string()).unwrap_or_default();
    let problem = format!("overlaps {other}, which is in use here; choose a free block or leave it unset");
    NetworkError::Config { key: "network.subnet", value: subnet.to_string(), problem }
}

async fn claim_free(
    handle: &rtnetlink::Handle,
    instance: InstanceId,
    remembered: Option<Block>,
    taken: &[Taken],
) -> io::Result<Result<Block, NetworkError>> {
    let remembered = remembered.filter(|subnet| subnet::is_free(*subnet, taken));
    for subnet in remembered.into_iter().chain(subnet::candidates(instance, taken)) {
        match subnet::claim(handle, subnet).await {
            // Another instance was quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            outcome => return outcome.map(|()| Ok(subnet)),
        }
    }
    Ok(Err(NetworkError::Host {
        what: "this host has routes into every private block".to_owned(),
        remedy: "set network.subnet to an IPv4 block that nothing here uses".to_owned(),
        source: None,
    }))
}

fn lock() -> io::Result<Flock<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(LOCK)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn turn_forwarding_on(instance: InstanceId) -> Result<(), NetworkError> {
    let _lock = lock().map_err(step("locking the host's forwarding switch"))?;
    let is_on = is_forwarding().map_err(step("reading net.ipv4.ip_forward"))?;
    let mut table = Transaction::on(SHARED_TABLE);
    table.chain(&rules::table_name(instance));
    if !is_on {
        table.chain(WAS_OFF);
    }
    table.apply().map_err(step("writing the nft table that all instances share"))?;
    if is_on {
        return Ok(());
    }
    std::fs::write(FORWARDING, "1").map_err(|source| NetworkError::Host {
        what: "net.ipv4.ip_forward is off and cannot be turned on".to_owned(),
        remedy: "run `sysctl -w net.ipv4.ip_forward=1` on the host (Docker: --sysctl net.ipv4.ip_forward=1)".to_owned(),
        source: Some(source.into()),
    })
}

/// The last instance turns off what the first turned on, unless somebody else does NAT here: Docker, libvirt and others
/// see that forwarding is on when they start and rely on it from then on.
fn turn_forwarding_off(instance: InstanceId) -> io::Result<()> {
    let _lock = lock()?;
    let others = foreign::chains()?;
    let shared: Vec<&str> = others.iter().filter(|chain| chain.table == SHARED_TABLE).map(|chain| chain.name.as_str()).collect();
    let own = rules::table_name(instance);
    if !shared.contains(&own.as_str()) {
        return Ok(());
    }
    if shared.iter().any(|name| *name != own && *name != WAS_OFF) {
        let mut table = Transaction::on(SHARED_TABLE);
        table.remove_chain(&own);
        return table.apply();
    }
    if shared.contains(&WAS_OFF) && !others.iter().any(foreign::Chain::does_foreign_nat) && !foreign::legacy_nat() {
        std::fs::write(FORWARDING, "0")?;
    }
    Transaction::without(SHARED_TABLE).apply()
}

fn is_forwarding() -> io::Result<bool> {
    Ok(std::fs::read_to_string(FORWARDING)?.trim() == "1")
}
