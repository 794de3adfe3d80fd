//! The inner half of a sandbox's network, done inside the sandbox's own netns by whoever starts its processes.
//!
//! The daemon does it for a container that libcontainer has created and not started; the helper does it in CRIU's
//! `setup-namespaces` hook, before the sockets come back (a missing address fails the restore). Nothing of it is in a
//! dump, so it is the same work both times.

use super::links::{self, VethEnd};
use crate::sys::netns::Netns;
use futures_util::TryFutureExt;
use rtnetlink::{Handle, RouteMessageBuilder};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use tokio::try_join;

/// Name and index of the sandbox's end, the same in every sandbox. Indices of our choice are above those that the
/// kernel gives to the tunnel devices that it may put into every new netns (`sit0`, `tunl0` and more).
const INNER_LINK: (&str, u32) = ("eth0", 100);
/// Name and index of the slot's end.
pub(super) const SLOT_INNER_LINK: (&str, u32) = ("in", 101);

/// What has to be done inside a sandbox's netns to lead it out through its slot. Travels to the helper as JSON.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InnerNetwork {
    /// The slot's pin, below `data_dir/netns/`.
    pub slot_netns: PathBuf,
    /// The address inside: the same in every sandbox, because dumps carry it.
    pub address: Ipv4Addr,
    /// The slot's address: gateway and name server.
    pub gateway: Ipv4Addr,
    /// Prefix length of the block that both are in.
    pub prefix: u8,
    /// MTU of the host's way out.
    pub mtu: u32,
}

/// The way out of a sandbox, opened where the slot's pin is seen.
#[derive(Debug)]
pub struct WayOut<'a> {
    network: &'a InnerNetwork,
    slot: Netns,
}

impl InnerNetwork {
    /// Opens the slot's pin, which a process sees only in a mount namespace that has the data folder's mounts.
    pub fn open(&self) -> io::Result<WayOut<'_>> {
        Ok(WayOut { network: self, slot: Netns::open(&self.slot_netns)? })
    }
}

impl WayOut<'_> {
    /// Brings up `lo`, makes `eth0` with address and default route, and sets the sysctls that every sandbox has
    /// (ports and ping without privileges, no IPv6 but on `lo`). Replaces what an earlier try left in the slot.
    ///
    /// Blocks for about a millisecond, on a thread of its own. `sandbox` must have been made by this sandbox: it has
    /// no `eth0`. On failure, what was made goes away with that netns.
    pub fn attach(&self, sandbox: &Netns) -> io::Result<()> {
        sandbox.run(|| {
            write_sysctls()?;
            let runtime = links::runtime()?;
            let inside = {
                let _context = runtime.enter();
                links::connect()?
            };
            // The second connection is made from the slot; the first stays where it was made.
            let outside = {
                let _context = runtime.enter();
                self.slot.enter_this_thread()?;
                links::connect()?
            };
            runtime.block_on(self.connect(&inside, &outside))
        })
    }

    /// Sends together what does not wait for each other: the kernel does one after the other, but nobody wakes between.
    async fn connect(&self, inside: &Handle, outside: &Handle) -> io::Result<()> {
        let lo = inside.link().set(links::link(links::LO_INDEX).up().build()).execute().map_err(links::into_io);
        try_join!(lo, self.make_veth(inside, outside))?;
        let slot_up = outside.link().set(links::link(SLOT_INNER_LINK.1).up().build()).execute();
        let slot_address = outside.address().add(SLOT_INNER_LINK.1, self.network.gateway.into(), self.network.prefix).execute();
        let address = inside.address().add(INNER_LINK.1, self.network.address.into(), self.network.prefix).execute();
        try_join!(slot_up, slot_address, address).map_err(links::into_io)?;
        let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(self.network.gateway).output_interface(INNER_LINK.1).build();
        inside.route().add(default).execute().await.map_err(links::into_io)
    }

    async fn make_veth(&self, inside: &Handle, outside: &Handle) -> io::Result<()> {
        let eth0 = VethEnd { name: INNER_LINK.0, index: Some(INNER_LINK.1), netns: None };
        let peer = VethEnd { name: SLOT_INNER_LINK.0, index: Some(SLOT_INNER_LINK.1), netns: Some(self.slot.as_fd()) };
        let pair = || links::veth_pair(&eth0, &peer, self.network.mtu);
        match inside.link().add(pair()).execute().await {
            Ok(()) => Ok(()),
            // The slot still has the end of an earlier try whose netns is not gone yet.
            Err(error) if links::errno(&error) == Some(nix::libc::EEXIST) => {
                links::remove(outside, SLOT_INNER_LINK.0).await?;
                inside.link().add(pair()).execute().await.map_err(links::into_io)
            }
            Err(error) => Err(links::into_io(error)),
        }
    }
}

/// The calling thread is in the sandbox's netns. The group range holds *host* gids, as seen from the writer's user
/// namespace, so it has to span all of them. Before `eth0` exists: it inherits from `default`.
fn write_sysctls() -> io::Result<()> {
    let net = Path::new("/proc/sys/net");
    std::fs::write(net.join("ipv4/ip_unprivileged_port_start"), "0")?;
    std::fs::write(net.join("ipv4/ping_group_range"), "0 2147483647")?;
    turn_off(&net.join("ipv6/conf/default/disable_ipv6"), "1")?;
    // Go programs listen on multipath TCP by default, and CRIU cannot dump such sockets; without it they take plain TCP.
    turn_off(&net.join("mptcp/enabled"), "0")
}

/// A kernel without the feature has nothing to turn off.
fn turn_off(switch: &Path, value: &str) -> io::Result<()> {
    match std::fs::write(switch, value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
