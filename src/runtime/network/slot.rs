//! One slot: made, recycled, removed. Blocking work on threads of its own; the caller keeps the numbers.

use super::inner::SLOT_INNER_LINK;
use super::links::{self, VethEnd};
use super::rules::{self, Block, SLOT_OUTER_LINK, SlotRules};
use super::subnet::AddressPlan;
use crate::model::{InstanceId, NetworkPolicy, SandboxId};
use crate::sys::conntrack;
use crate::sys::netns::{self, Netns};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Longest name that a link may have.
const LINK_NAME_BYTES_MAX: usize = 15;

/// Index of the slot's end of the link to the host, chosen as those in inner.rs are.
const UP_INDEX: u32 = 102;

/// What all slots of an instance have in common.
#[derive(Debug, Clone)]
pub(super) struct SlotPlan {
    pub(super) instance: InstanceId,
    /// Where the host's ends live.
    pub(super) home: Netns,
    /// Folder of the pins.
    pub(super) pins: PathBuf,
    pub(super) addresses: AddressPlan,
    /// The address inside every sandbox, and the slot's beside it.
    pub(super) inner: Ipv4Addr,
    pub(super) gateway: Ipv4Addr,
    pub(super) mtu: u32,
    /// As in [`rules::HostRules`].
    pub(super) private_exceptions: Option<Vec<Block>>,
    /// Where the server's public URLs are served to the sandbox.
    pub(super) front_port: Option<u16>,
}

impl SlotPlan {
    pub(super) fn pin(&self, number: u32) -> PathBuf {
        self.pins.join(number.to_string())
    }

    /// Name of the host's end.
    pub(super) fn link_name(&self, number: u32) -> String {
        let name = format!("{}{number}", rules::link_prefix(self.instance));
        debug_assert!(name.len() <= LINK_NAME_BYTES_MAX, "slot numbers stay below 10^8, because addresses do");
        name
    }
}

/// A slot that exists.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) number: u32,
    pub(super) netns: Netns,
    /// Index of the host's end.
    host_index: u32,
    /// Packets that had come out of it when its connections were last forgotten.
    forgotten: Arc<AtomicU64>,
}

/// Of a slot that an earlier server made: nobody knows what came out of it.
const UNKNOWN: u64 = u64::MAX;

impl Slot {
    /// Makes a slot that lets everything out. Blocks for some 20 ms. On failure nothing is left.
    pub(super) fn make(plan: &SlotPlan, number: u32) -> io::Result<Self> {
        let made = Netns::create_pinned(&plan.pin(number)).and_then(|netns| Self::furnish(plan, number, netns));
        if made.is_err() {
            remove(plan, number)?;
        }
        made
    }

    fn furnish(plan: &SlotPlan, number: u32, netns: Netns) -> io::Result<Self> {
        let name = plan.link_name(number);
        let host_index = netns.run(|| {
            write_slot_sysctls()?;
            slot_rules(plan).transaction().apply()?;
            let runtime = links::runtime()?;
            let _context = runtime.enter();
            let inside = links::connect()?;
            plan.home.enter_this_thread()?;
            let outside = links::connect()?;
            runtime.block_on(async {
                link_inside(plan, number, &name, &inside).await?;
                link_outside(plan, number, &name, &outside).await
            })
        })?;
        Ok(Self { number, netns, host_index, forgotten: Arc::default() })
    }

    /// Finds a slot that an earlier server made; `NotFound` when it is not whole.
    pub(super) fn find(plan: &SlotPlan, number: u32) -> io::Result<Self> {
        let netns = Netns::open(&plan.pin(number))?;
        let name = plan.link_name(number);
        let found = plan.home.run(|| on_netlink(async |handle| links::index_of(&handle, &name).await))?;
        let host_index = found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("link {name} is gone")))?;
        Ok(Self { number, netns, host_index, forgotten: Arc::new(AtomicU64::new(UNKNOWN)) })
    }

    /// Replaces the egress rules. Blocks for the few milliseconds that `nft` takes.
    pub(super) fn apply_policy(&self, instance: InstanceId, policy: &NetworkPolicy) -> io::Result<()> {
        self.netns.run(|| rules::policy_transaction(instance, policy).apply())
    }

    /// Names the sandbox in the host end's ifalias; `None` takes the name away.
    pub(super) async fn label(&self, handle: &Handle, sandbox: Option<SandboxId>) -> io::Result<()> {
        let alias = sandbox.map(|id| id.to_string()).unwrap_or_default();
        handle.link().set(links::link(self.host_index).alias(alias).build()).execute().await.map_err(links::into_io)
    }

    /// Takes away all that the last sandbox left: its link, its connections and, where it had some, its rules.
    pub(super) fn reset(&self, plan: &SlotPlan, policy: Option<&NetworkPolicy>) -> io::Result<()> {
        self.netns.run(|| {
            on_netlink(async |handle| links::remove(&handle, SLOT_INNER_LINK.0).await)?;
            if let Some(policy) = policy {
                rules::policy_transaction(plan.instance, policy).apply()?;
            }
            conntrack::flush()
        })?;
        self.forget_outside(plan)
    }

    /// The host knows of connections only when packets came out: a sandbox that never spoke to the world is spared the
    /// walk through the host's whole table, 12 ms of CPU.
    fn forget_outside(&self, plan: &SlotPlan) -> io::Result<()> {
        let came_out = plan.home.run(|| on_netlink(async |handle| links::packets_received(&handle, self.host_index).await))?;
        if came_out != self.forgotten.load(Ordering::Relaxed) {
            forget_connections(plan, self.number)?;
            self.forgotten.store(came_out, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Removes whatever there is of a slot: the host's end first, since a netns lets go of its links only later.
pub(super) fn remove(plan: &SlotPlan, number: u32) -> io::Result<()> {
    let name = plan.link_name(number);
    plan.home.run(|| on_netlink(async |handle| links::remove(&handle, &name).await))?;
    forget_connections(plan, number)?;
    netns::unpin(&plan.pin(number))
}

fn forget_connections(plan: &SlotPlan, number: u32) -> io::Result<()> {
    plan.home.run(|| conntrack::flush_source(plan.addresses.slot(number)).map(|_| ()))
}

/// Runs netlink requests in the netns of the calling thread.
pub(super) fn on_netlink<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    let runtime = links::runtime()?;
    let _context = runtime.enter();
    let handle = links::connect()?;
    runtime.block_on(work(handle))
}

fn slot_rules(plan: &SlotPlan) -> SlotRules<'_> {
    SlotRules {
        instance: plan.instance,
        inner: plan.inner,
        gateway: plan.gateway,
        front_port: plan.front_port,
        inner_link: SLOT_INNER_LINK.0,
        private_exceptions: plan.private_exceptions.as_deref(),
    }
}

async fn link_inside(plan: &SlotPlan, number: u32, name: &str, inside: &Handle) -> io::Result<()> {
    let up = VethEnd { name: SLOT_OUTER_LINK, index: Some(UP_INDEX), netns: None };
    let host = VethEnd { name, index: None, netns: Some(plan.home.as_fd()) };
    inside.link().set(links::link(links::LO_INDEX).up().build()).execute().await.map_err(links::into_io)?;
    inside.link().add(links::veth_pair(&up, &host, plan.mtu)).execute().await.map_err(links::into_io)?;
    inside.address().add(UP_INDEX, plan.addresses.slot(number).into(), 32).execute().await.map_err(links::into_io)?;
    let gateway = plan.addresses.host();
    let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(UP_INDEX).onlink().build();
    inside.route().add(default).execute().await.map_err(links::into_io)
}

/// The calling thread is at home.
async fn link_outside(plan: &SlotPlan, number: u32, name: &str, outside: &Handle) -> io::Result<u32> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("link {name} vanished while it was being set up"));
    let index = links::index_of(outside, name).await?.ok_or_else(missing)?;
    write_link_sysctls(name)?;
    outside.link().set(links::link(index).up().build()).execute().await.map_err(links::into_io)?;
    outside.address().add(index, plan.addresses.host().into(), 32).execute().await.map_err(links::into_io)?;
    let slot = plan.addresses.slot(number);
    let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(slot, 32).output_interface(index);
    let route = route.scope(rtnetlink::packet_route::route::RouteScope::Link).build();
    outside.route().add(route).execute().await.map_err(links::into_io)?;
    Ok(index)
}

/// The calling thread is in the slot: it forwards, and speaks no IPv6 at all.
fn write_slot_sysctls() -> io::Result<()> {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    for link in ["all", "default"] {
        write_if_there(&format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"), "1")?;
    }
    Ok(())
}

/// The host's end takes packets only from the address that its route leads to, and speaks no IPv6.
fn write_link_sysctls(name: &str) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), "1")?;
    write_if_there(&format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")
}

/// A kernel without IPv6 has nothing to turn off.
fn write_if_there(path: &str, value: &str) -> io::Result<()> {
    match std::fs::write(Path::new(path), value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
