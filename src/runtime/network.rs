//! A sandbox's way out: pooled slots with NAT and that sandbox's own egress rules, and the host's way in.
//!
//! ```text
//!  sandbox netns           slot netns (one per sandbox)                     host
//!  eth0 10.254.0.2/30 ──── in 10.254.0.1/30   up 10.x.y.z/32 ────────────── sb<instance><slot> 10.x.0.1/32
//!  the same in all         egress rules, DNS responder, masquerade          no sandbox to sandbox, host or LAN; masquerade
//! ```
//!
//! A slot is made ahead of time, leased to one sandbox, and recycled: rules reset, conntrack flushed. The sandbox's own
//! netns belongs to its user namespace and comes and goes with its processes (checkpoint.md 2.1); [`InnerNetwork`] is
//! what has to be done in it, by whoever starts the processes. The host dials into a sandbox by a socket made inside
//! ([`Network::dial`]), never over these links.
//!
//! What outlives the process: links `sb<instance><slot>`, the nft table `stillbox_<instance>` (in the host's netns and in
//! each slot), pins and policies below `data_dir/netns/`, an unreachable route that claims the instance's subnet.

mod dns;
mod foreign;
mod front;
mod gate;
mod host;
mod inner;
mod intercept;
mod links;
mod names;
mod nft;
mod pool;
mod record;
pub mod resolver;
mod rewrite;
mod rules;
mod services;
mod slot;
mod sniff;
mod socks;
mod subnet;

pub use front::Front;
pub use inner::InnerNetwork;
pub use intercept::Interception;

use crate::model::{InstanceId, NetworkPolicy, SandboxId, SecretRecord};
use crate::sys::netns::{Netns, SocketFactory, SocketKind};
use dns::Upstreams;
use front::OwnNames;
use host::{Host, Leftovers};
use pool::{Lent, Pool, Taken};
use record::Record;
use rewrite::Secrets;
use services::{Means, Services, View};
use slot::{Slot, SlotPlan};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::join;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tracing::warn;

/// How many times `pool_slots` may lie ready when many are given back at once: recycling is cheaper than making.
const READY_PER_POOL: u32 = 2;
/// A slot is replaced when none was asked for during so long, at the latest after the second of these: making one takes
/// CPU and the kernel's network lock, which the creates need that take them. Who finds none makes one.
const REFILL_CALM: Duration = Duration::from_millis(250);
const REFILL_DELAY_MAX: Duration = Duration::from_secs(2);
/// How often the host's rules are looked after; it takes a run of `nft`, some 5 ms.
const MEND_INTERVAL: Duration = Duration::from_secs(10);
/// How long nothing is made ahead of time after that failed.
const REFILL_PAUSE: Duration = Duration::from_secs(1);

/// Keys `[network]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// The block that the slots' outer addresses come from, e.g. `10.130.0.0/18`; unset: a free one is found and kept.
    pub subnet: Option<String>,
    /// Slots that are kept ready for the next sandboxes.
    pub pool_slots: u32,
    /// Most slots at a time, leased and pooled together.
    pub slots_max: u32,
    /// Whether private, shared and link-local destinations beyond the host are out of reach for every sandbox.
    pub deny_private: bool,
    /// Blocks that stay reachable in spite of `deny_private`, e.g. a package mirror in the LAN.
    pub allow_private: Vec<String>,
    /// Name servers that sandboxes' questions are forwarded to; empty: those of the host's /etc/resolv.conf.
    pub dns_upstreams: Vec<IpAddr>,
    /// Where this server's public URLs are; unset: sandboxes do not reach them.
    #[serde(skip)]
    pub front: Option<Front>,
    /// Authorities that other ends' certificates may come from, beside the system's, where requests are changed (PEM).
    pub extra_ca_file: Option<PathBuf>,
    /// How requests are changed; unset: policies with rules are refused.
    #[serde(skip)]
    pub interception: Option<Interception>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            subnet: None,
            pool_slots: 8,
            slots_max: 4096,
            deny_private: true,
            allow_private: Vec::new(),
            dns_upstreams: Vec::new(),
            front: None,
            extra_ca_file: None,
            interception: None,
        }
    }
}

/// Why the network side failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A part of the policy that this server cannot enforce; nothing was changed.
    #[error("{field} is not supported by this server")]
    Unsupported {
        /// The field as E2B's wire spells it, e.g. `network.egressProxy`.
        field: &'static str,
    },
    /// A configuration value that cannot work.
    #[error("{key} = '{value}' {problem}")]
    Config {
        /// The key, e.g. `network.subnet`.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The machine lacks something; the message says the next step.
    #[error("{what}; {remedy}")]
    Host {
        /// What is missing or refused.
        what: String,
        /// The next step.
        remedy: String,
        /// Why.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Every slot is taken.
    #[error("all {limit} network slots are in use; kill sandboxes or raise network.slots_max")]
    NoSlot {
        /// The bound.
        limit: u32,
    },
    /// The slot does not exist (any more): not leased, or the machine was rebooted since.
    #[error("network slot {slot} does not exist")]
    Gone {
        /// The slot.
        slot: u32,
    },
    /// A step in the kernel failed; what was made for it has been removed.
    #[error("{step} failed")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A slot that belongs to one sandbox until [`Network::release`]. Plain data: dropping it releases nothing, because
/// sandboxes outlive the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotLease {
    /// Its number; names the link, the pin and the address.
    pub slot: u32,
    /// What is to be done inside the sandbox's netns.
    pub inner: InnerNetwork,
}

/// The address inside every sandbox, the slot's beside it, and the prefix length of the two. Dumps carry them.
const INNER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 2);
const INNER_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 1);
const INNER_PREFIX: u8 = 30;

/// The network of one server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: NetworkConfig,
    plan: SlotPlan,
    host: Host,
    /// Netlink in the host's netns.
    links: rtnetlink::Handle,
    sockets: SocketFactory,
    upstreams: Arc<Upstreams>,
    secrets: watch::Sender<Arc<Secrets>>,
    /// For connections of sandboxes to this server's own URLs.
    front_places: Arc<Semaphore>,
    pool: Pool,
}

impl Network {
    /// Claims a subnet, writes the host's rules, turns forwarding on and starts to fill the pool. What an earlier server
    /// of this instance left is found again; call [`Network::adopt`] for what lives and then [`Network::sweep`].
    pub async fn open(config: NetworkConfig, instance: InstanceId, data_dir: &Path) -> Result<Self, NetworkError> {
        let pins = data_dir.join("netns");
        let found = blocking({
            let pins = pins.clone();
            move || record::found_slots(&pins)
        });
        let found = found.await.map_err(step("reading the pins of network namespaces"))?;
        let leftovers = if found.is_empty() { Leftovers::None } else { Leftovers::Slots };
        let host = {
            let (config, pins) = (config.clone(), pins.clone());
            tokio::task::spawn_blocking(move || Host::open(&config, instance, &pins, leftovers))
        };
        let host = host.await.map_err(|error| step("setting up the host's network")(io::Error::other(error)))??;
        let home = Netns::current().map_err(step("opening the host's network namespace"))?;
        let (connection, links, _) = rtnetlink::new_connection().map_err(step("opening a netlink socket"))?;
        tokio::spawn(connection);
        let sockets = SocketFactory::start().map_err(step("starting the socket factory"))?;
        let (inner, gateway) = (INNER_ADDRESS, INNER_GATEWAY);
        let (addresses, mtu, private_exceptions) = (host.addresses, host.mtu, host.private_exceptions.clone());
        let front_port = config.front.as_ref().map(|front| front.port);
        let plan = SlotPlan { instance, home, pins, addresses, inner, gateway, mtu, private_exceptions, front_port };
        let upstreams = Arc::new(Upstreams::new(config.dns_upstreams.clone()));
        let front_places = Arc::new(Semaphore::new(config.front.as_ref().map_or(0, |front| front.connections_max)));
        let pool = Pool::new(config.slots_max.min(host.addresses.slots()), found);
        let secrets = watch::Sender::default();
        let shared = Arc::new(Shared { config, plan, host, links, sockets, upstreams, secrets, front_places, pool });
        shared.pool.spawn(Arc::clone(&shared).keep_filled());
        shared.pool.spawn(Arc::clone(&shared).keep_mended());
        Ok(Self { shared })
    }

    /// A slot for `sandbox` with these rules, out of the pool if there is one ready (then about a millisecond).
    pub async fn lease(&self, sandbox: SandboxId, policy: &NetworkPolicy) -> Result<SlotLease, NetworkError> {
        self.shared.check(policy)?;
        let slot = self.shared.take_slot().await?;
        match self.shared.dress(&slot, sandbox, policy).await {
            Ok(services) => {
                let number = slot.number;
                self.shared.pool.lend(Lent { slot, services });
                Ok(self.shared.lease_of(number))
            }
            Err(error) => {
                self.shared.pool.spawn(Arc::clone(&self.shared).recycle(slot));
                Err(error)
            }
        }
    }

    /// Takes over the slot of a sandbox that an earlier server left running. Rules that it had and `policy` does not say
    /// are replaced.
    pub async fn adopt(&self, slot: u32, sandbox: SandboxId, policy: &NetworkPolicy) -> Result<SlotLease, NetworkError> {
        let plan = self.shared.plan.clone();
        let found = blocking(move || {
            let record = Record::read(&plan.pins, slot)?;
            Ok((Slot::find(&plan, slot)?, record))
        });
        let (found, record) = match found.await {
            Ok((found, record)) if record.sandbox == sandbox => (found, record),
            Ok(_) => return Err(NetworkError::Gone { slot }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NetworkError::Gone { slot }),
            Err(error) => return Err(step("taking over a network slot")(error)),
        };
        let services = self.shared.serve(&found, &record.policy).await?;
        self.shared.pool.lend(Lent { slot: found, services });
        if record.policy != *policy {
            self.set_policy(slot, policy).await?;
        }
        Ok(self.shared.lease_of(slot))
    }

    /// [`inner::WayOut::attach`] for async callers.
    pub async fn attach(&self, lease: &SlotLease, sandbox: Netns) -> Result<(), NetworkError> {
        let inner = lease.inner.clone();
        blocking(move || inner.open()?.attach(&sandbox)).await.map_err(step("attaching a sandbox to its network slot"))
    }

    /// Replaces the egress rules of a leased slot at once; connections that are open go on.
    pub async fn set_policy(&self, slot: u32, policy: &NetworkPolicy) -> Result<(), NetworkError> {
        self.shared.check(policy)?;
        let (lent, view) = self.shared.pool.lent(slot).ok_or(NetworkError::Gone { slot })?;
        let (plan, policy) = (self.shared.plan.clone(), policy.clone());
        blocking(move || {
            lent.apply_policy(plan.instance, &policy)?;
            view.send_replace(View::of(&policy));
            Record::read(&plan.pins, slot).and_then(|record| Record { policy, ..record }.write(&plan.pins, slot))
        })
        .await
        .map_err(step("replacing a sandbox's egress rules"))
    }

    /// Replaces all stored secrets; requests that begin later carry these.
    pub fn set_secrets(&self, secrets: Vec<SecretRecord>) {
        self.shared.secrets.send_replace(Arc::new(Secrets::of(secrets)));
    }

    /// Connects to a port on 127.0.0.1, else ::1, in a sandbox's own netns. One attempt; needs no slot. Cancel-safe.
    pub async fn dial(&self, sandbox: &Netns, port: u16) -> io::Result<TcpStream> {
        match self.dial_address(sandbox, SocketKind::TcpV4, (Ipv4Addr::LOCALHOST, port).into()).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.dial_address(sandbox, SocketKind::TcpV6, (Ipv6Addr::LOCALHOST, port).into()).await
            }
            outcome => outcome,
        }
    }

    async fn dial_address(&self, netns: &Netns, kind: SocketKind, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.shared.sockets.socket(netns, kind).await?;
        TcpSocket::from_std_stream(socket.into()).connect(address).await
    }

    /// Gives a slot back; it is recycled in the background. Succeeds when it is not leased.
    pub async fn release(&self, slot: u32) -> Result<(), NetworkError> {
        if let Some(Lent { slot, services }) = self.shared.pool.take_back(slot) {
            let shared = Arc::clone(&self.shared);
            self.shared.pool.spawn(async move {
                services.stop().await;
                shared.recycle(slot).await;
            });
        }
        Ok(())
    }

    /// Removes every slot that an earlier server left and that is neither in `keep` nor adopted.
    pub async fn sweep(&self, keep: &[u32]) -> Result<(), NetworkError> {
        for number in self.shared.pool.unclaimed(keep) {
            self.shared.remove(number).await.map_err(step("removing a network slot that nobody owns"))?;
        }
        Ok(())
    }

    /// Empties the pool and ends what is served inside slots. The host's rules, the subnet and forwarding go with the
    /// last slot: leased ones keep them, and their sandboxes the way out.
    pub async fn close(&self) {
        let (ready, lent) = self.shared.pool.close().await;
        for Lent { services, .. } in lent {
            services.stop().await;
        }
        for slot in ready {
            if let Err(error) = self.shared.remove(slot.number).await {
                warn!(slot = slot.number, error = &error as &dyn std::error::Error, "Could not remove network slot {}", slot.number);
            }
        }
        if self.shared.pool.is_in_use() {
            return;
        }
        let host = self.shared.host.clone();
        if let Err(error) = blocking(move || host.close()).await {
            warn!(error = &error as &dyn std::error::Error, "Could not take back all of the host's network rules");
        }
    }

    /// What /etc/resolv.conf says inside every sandbox: the slot's gateway, which forwards to the host's resolvers.
    pub fn resolv_conf(&self) -> String {
        format!("nameserver {INNER_GATEWAY}\n")
    }

    /// The address that every sandbox has inside; dumps carry it.
    pub fn inner_address(&self) -> Ipv4Addr {
        INNER_ADDRESS
    }
}

impl Shared {
    /// Whether this server can enforce `policy`: refused before anything is made.
    fn check(&self, policy: &NetworkPolicy) -> Result<(), NetworkError> {
        if policy.changes_requests() && self.config.interception.is_none() {
            return Err(NetworkError::Unsupported { field: "network.rules" });
        }
        Ok(())
    }

    fn lease_of(&self, slot: u32) -> SlotLease {
        let inner = InnerNetwork {
            slot_netns: self.plan.pin(slot),
            address: INNER_ADDRESS,
            gateway: INNER_GATEWAY,
            prefix: INNER_PREFIX,
            mtu: self.plan.mtu,
        };
        SlotLease { slot, inner }
    }

    /// A ready slot, or one made now.
    async fn take_slot(&self) -> Result<Slot, NetworkError> {
        match self.pool.take() {
            Taken::Ready(slot) => Ok(slot),
            Taken::Number(number) => self.make(number).await.map_err(step("making a network slot")),
            Taken::None { limit } => Err(NetworkError::NoSlot { limit }),
        }
    }

    async fn make(&self, number: u32) -> io::Result<Slot> {
        let plan = self.plan.clone();
        let made = blocking(move || Slot::make(&plan, number)).await;
        if made.is_err() {
            self.pool.forget(number);
        }
        made
    }

    /// Writes down whose slot it is before it is used, and puts the policy in force.
    async fn dress(&self, slot: &Slot, sandbox: SandboxId, policy: &NetworkPolicy) -> Result<Services, NetworkError> {
        let record = Record { sandbox, policy: policy.clone() };
        record.write(&self.plan.pins, slot.number).map_err(step("writing down a network slot's owner"))?;
        let label = async { slot.label(&self.links, Some(sandbox)).await.map_err(step("naming a network slot's link")) };
        // All are waited for, even when one fails: the slot is recycled then, and nobody may still be writing to it.
        let (label, rules, services) = join!(label, self.apply_policy(slot, &record), self.serve(slot, policy));
        label.and(rules).and(services)
    }

    async fn apply_policy(&self, slot: &Slot, record: &Record) -> Result<(), NetworkError> {
        if record.has_default_rules() {
            return Ok(());
        }
        let (slot, instance, policy) = (slot.clone(), self.plan.instance, record.policy.clone());
        blocking(move || slot.apply_policy(instance, &policy)).await.map_err(step("writing a sandbox's egress rules"))
    }

    async fn serve(&self, slot: &Slot, policy: &NetworkPolicy) -> Result<Services, NetworkError> {
        let places = || Arc::clone(&self.front_places);
        let own = self.config.front.clone().map(|front| OwnNames { front, gateway: INNER_GATEWAY, places: places() });
        let means = Means { sockets: &self.sockets, interception: self.config.interception.as_ref(), secrets: &self.secrets };
        let started = Services::start(&slot.netns, policy, Arc::clone(&self.upstreams), own, means);
        started.await.map_err(step("starting a network slot's services"))
    }

    /// Makes a slot as new, for the next one; what cannot be reset is removed.
    async fn recycle(self: Arc<Self>, slot: Slot) {
        let number = slot.number;
        let reset = self.reset(&slot).await;
        if let Err(error) = &reset {
            warn!(slot = number, error = error as &dyn std::error::Error, "Could not reset network slot {number}; it is removed");
        }
        let ready_max = if reset.is_ok() { self.config.pool_slots.saturating_mul(READY_PER_POOL) } else { 0 };
        self.keep_or_remove(slot, ready_max).await;
    }

    async fn keep_or_remove(&self, slot: Slot, ready_max: u32) {
        let number = slot.number;
        if self.pool.put(slot, ready_max) {
            return;
        }
        if let Err(error) = self.remove(number).await {
            warn!(slot = number, error = &error as &dyn std::error::Error, "Could not remove network slot {number}");
        }
    }

    async fn reset(&self, slot: &Slot) -> io::Result<()> {
        let (plan, used) = (self.plan.clone(), slot.clone());
        blocking(move || {
            let had_rules = Record::read(&plan.pins, used.number).map_or(true, |record| !record.has_default_rules());
            used.reset(&plan, had_rules.then(NetworkPolicy::default).as_ref())?;
            Record::remove(&plan.pins, used.number)
        })
        .await?;
        slot.label(&self.links, None).await
    }

    async fn remove(&self, number: u32) -> io::Result<()> {
        let plan = self.plan.clone();
        blocking(move || {
            slot::remove(&plan, number)?;
            Record::remove(&plan.pins, number)
        })
        .await?;
        self.pool.forget(number);
        Ok(())
    }

    /// Looks after the host's rules until the pool is closed.
    async fn keep_mended(self: Arc<Self>) {
        loop {
            tokio::select! {
                // Cancel-safe: it waits on a value that stays.
                () = self.pool.closing() => return,
                // Cancel-safe: a timer.
                () = tokio::time::sleep(MEND_INTERVAL) => {}
            }
            let host = self.host.clone();
            match tokio::task::spawn_blocking(move || host.mend()).await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => warn!("Somebody removed network rules of this server; they are back"),
                Ok(Err(error)) => warn!(error = &error as &dyn std::error::Error, "Could not look after the host's network rules"),
                Err(error) => warn!(error = &error as &dyn std::error::Error, "Looking after the host's network rules broke off"),
            }
        }
    }

    /// Makes slots ahead of time until the pool is closed.
    async fn keep_filled(self: Arc<Self>) {
        while let Some(number) = self.pool.next_to_make(self.config.pool_slots).await {
            self.pool.calm(REFILL_CALM, REFILL_DELAY_MAX).await;
            if self.pool.is_closed() {
                return self.pool.forget(number);
            }
            match self.make(number).await {
                Ok(slot) => self.keep_or_remove(slot, u32::MAX).await,
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "Could not make a network slot ahead of time");
                    tokio::time::sleep(REFILL_PAUSE).await;
                }
            }
        }
    }
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Step { step, source: source.into() }
}

/// Runs what blocks where blocking is allowed. Dropping the future does not stop it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
