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

mod inner;
mod links;

pub use inner::InnerNetwork;

use crate::model::{InstanceId, NetworkPolicy, SandboxId};
use crate::sys::netns::Netns;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use tokio::net::TcpStream;

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
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { subnet: None, pool_slots: 4, slots_max: 4096, deny_private: true, allow_private: Vec::new(), dns_upstreams: Vec::new() }
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

/// The network of one server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    pins: PathBuf,
}

impl Network {
    /// Claims a subnet, writes the host's rules, turns forwarding on and starts to fill the pool. What an earlier server
    /// of this instance left is found again; call [`Network::adopt`] for what lives and then [`Network::sweep`].
    pub async fn open(config: NetworkConfig, instance: InstanceId, data_dir: &Path) -> Result<Self, NetworkError> {
        todo!("lands within the hour: {config:?} {instance} {data_dir:?}")
    }

    /// Whether this server can enforce `policy`: the typed refusal for the API, before anything is made.
    pub fn check(policy: &NetworkPolicy) -> Result<(), NetworkError> {
        todo!("{policy:?}")
    }

    /// A slot for `sandbox` with these rules, out of the pool if there is one ready (then about a millisecond).
    pub async fn lease(&self, sandbox: SandboxId, policy: &NetworkPolicy) -> Result<SlotLease, NetworkError> {
        todo!("{sandbox} {policy:?}")
    }

    /// Takes over the slot of a sandbox that an earlier server left running, with the rules that it had.
    pub async fn adopt(&self, slot: u32, sandbox: SandboxId) -> Result<SlotLease, NetworkError> {
        todo!("{slot} {sandbox}")
    }

    /// [`InnerNetwork::attach`] for async callers.
    pub async fn attach(&self, lease: &SlotLease, sandbox: Netns) -> Result<(), NetworkError> {
        todo!("{lease:?} {sandbox:?}")
    }

    /// Replaces the egress rules of a leased slot at once; connections that are open go on.
    pub async fn set_policy(&self, slot: u32, policy: &NetworkPolicy) -> Result<(), NetworkError> {
        todo!("{slot} {policy:?}")
    }

    /// Connects to a port on 127.0.0.1, else ::1, in a sandbox's own netns. One attempt; needs no slot. Cancel-safe.
    pub async fn dial(&self, sandbox: &Netns, port: u16) -> io::Result<TcpStream> {
        todo!("{sandbox:?} {port}")
    }

    /// Gives a slot back; it is recycled in the background. Succeeds when it is not leased.
    pub async fn release(&self, slot: u32) -> Result<(), NetworkError> {
        todo!("{slot}")
    }

    /// Removes every slot of this instance that is neither in `keep` nor made by this server.
    pub async fn sweep(&self, keep: &[u32]) -> Result<(), NetworkError> {
        todo!("{keep:?}")
    }

    /// Empties the pool. The host's rules, the subnet and forwarding go with the last slot: leased ones keep them.
    pub async fn close(&self) {
        todo!("{:?}", self.pins)
    }

    /// What /etc/resolv.conf says inside every sandbox: the slot's gateway, which forwards to the host's resolvers.
    pub fn resolv_conf(&self) -> String {
        todo!()
    }

    /// The address that every sandbox has inside; dumps carry it.
    pub fn inner_address(&self) -> Ipv4Addr {
        todo!()
    }
}
