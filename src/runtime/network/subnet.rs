//! Which outer addresses an instance has: a block of the host's address space that nothing else uses.
//!
//! The block is claimed by an unreachable route over all of it. That keeps addresses of slots that do not exist from
//! leaking to the default route, makes the claim visible to other instances, and lets the kernel decide when two of them
//! want the same block at the same moment.

use super::links;
use super::rules::Block;
use crate::model::InstanceId;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::io;
use std::net::Ipv4Addr;

/// Marks routes that Stillbox made (`ip route` shows `proto 83`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(83);
/// Blocks that are tried when none is configured: where home and office networks, Docker (172.17 and up) and VPNs are
/// rare first.
const CANDIDATES: [(Ipv4Addr, u8); 3] =
    [(Ipv4Addr::new(10, 128, 0, 0), 9), (Ipv4Addr::new(172, 16, 0, 0), 12), (Ipv4Addr::new(192, 168, 0, 0), 16)];
/// 4093 slots.
const CANDIDATE_PREFIX: u8 = 20;
/// A route this wide (a VPN's `0.0.0.0/1` and the like) goes around more specific ones: it is no obstacle.
const WIDE_PREFIX: u8 = 8;
const MTU_DEFAULT: u32 = 1500;
/// The least that IPv6-era paths carry, and what a jumbo frame is.
const MTU_RANGE: std::ops::RangeInclusive<u32> = 1280..=9000;

/// Outer addresses of an instance: the first is the host's on every link, the others are the slots'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AddressPlan {
    pub(super) subnet: Block,
}

impl AddressPlan {
    /// Address of the host's ends.
    pub(super) fn host(self) -> Ipv4Addr {
        Ipv4Addr::from(self.subnet.first() + 1)
    }

    /// Address of a slot below [`AddressPlan::slots`].
    pub(super) fn slot(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.subnet.first().saturating_add(2).saturating_add(number))
    }

    /// How many slots there are addresses for: all but network, host and broadcast.
    pub(super) fn slots(self) -> u32 {
        (self.subnet.last() - self.subnet.first()).saturating_sub(2)
    }
}

/// A route or claim in the host's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) block: Block,
    /// Made as a claim by some instance.
    pub(super) is_claim: bool,
}

/// All IPv4 routes of all tables, addresses of the host included (they are routes of table `local`).
pub(super) async fn taken(handle: &Handle) -> io::Result<Vec<Taken>> {
    let routes = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
    let routes: Vec<RouteMessage> = routes.try_collect().await.map_err(links::into_io)?;
    Ok(routes.iter().filter_map(taken_by).collect())
}

fn taken_by(route: &RouteMessage) -> Option<Taken> {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    let is_claim = route.header.protocol == PROTOCOL && route.header.kind == RouteType::Unreachable;
    Some(Taken { block: Block::new(destination, route.header.destination_prefix_length), is_claim })
}

/// The block inside every sandbox, seen as a route: an instance's subnet must not overlap it, since slots have both.
pub(super) fn inner_block(inner: Ipv4Addr, prefix: u8) -> Taken {
    Taken { block: Block::new(inner, prefix), is_claim: false }
}

/// Free blocks in the order in which this instance tries them: the same at every start, another one for every instance.
pub(super) fn candidates(instance: InstanceId, taken: &[Taken]) -> impl Iterator<Item = Block> {
    let seed = instance.as_str().bytes().fold(0u32, |seed, byte| seed.wrapping_mul(36).wrapping_add(byte.into()));
    let blocks = CANDIDATES.into_iter().flat_map(move |(address, prefix)| {
        let count = 1u32 << (CANDIDATE_PREFIX - prefix);
        let step = 1u32 << (32 - CANDIDATE_PREFIX);
        (0..count).map(move |nth| {
            let block = seed.wrapping_add(nth) % count;
            Block::new(Ipv4Addr::from(u32::from(address) + block * step), CANDIDATE_PREFIX)
        })
    });
    blocks.filter(|block| is_free(*block, taken))
}

/// Whether no route leads into the block.
pub(super) fn is_free(block: Block, taken: &[Taken]) -> bool {
    !taken.iter().any(|other| other.block.prefix() >= WIDE_PREFIX && other.block.overlaps(block))
}

fn claim_route(subnet: Block) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(subnet.address(), subnet.prefix())
        .kind(RouteType::Unreachable)
        .protocol(PROTOCOL)
        .build()
}

/// Claims a block; `AlreadyExists` when somebody was quicker.
pub(super) async fn claim(handle: &Handle, subnet: Block) -> io::Result<()> {
    handle.route().add(claim_route(subnet)).execute().await.map_err(links::into_io)
}

/// Gives a claim back; succeeds when there is none.
pub(super) async fn unclaim(handle: &Handle, subnet: Block) -> io::Result<()> {
    match handle.route().del(claim_route(subnet)).execute().await {
        Err(error) if links::errno(&error) != Some(nix::libc::ESRCH) => Err(links::into_io(error)),
        _ => Ok(()),
    }
}

/// MTU of the link that the default route leads over, so that what leaves a sandbox fits; 1500 without one.
pub(super) async fn uplink_mtu(handle: &Handle) -> io::Result<u32> {
    let routes = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
    let routes: Vec<RouteMessage> = routes.try_collect().await.map_err(links::into_io)?;
    let Some(index) = routes.iter().find_map(default_route_link) else { return Ok(MTU_DEFAULT) };
    let links: Vec<_> = handle.link().get().match_index(index).execute().try_collect().await.map_err(links::into_io)?;
    let mtu = links.iter().flat_map(|link| &link.attributes).find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Ok(mtu.unwrap_or(MTU_DEFAULT).clamp(*MTU_RANGE.start(), *MTU_RANGE.end()))
}

fn default_route_link(route: &RouteMessage) -> Option<u32> {
    let is_default = route.header.address_family == AddressFamily::Inet
        && route.header.destination_prefix_length == 0
        && route.header.table == RouteHeader::RT_TABLE_MAIN;
    let link = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    link.filter(|_| is_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken_blocks(texts: &[&str]) -> Vec<Taken> {
        texts.iter().map(|text| Taken { block: text.parse().unwrap(), is_claim: false }).collect()
    }

    #[test]
    fn an_instance_always_tries_the_same_blocks() {
        let instance: InstanceId = "abcde".parse().unwrap();
        let first: Vec<Block> = candidates(instance, &[]).take(3).collect();
        assert_eq!(first, candidates(instance, &[]).take(3).collect::<Vec<_>>());
        assert_ne!(first[0], candidates("abcdf".parse().unwrap(), &[]).next().unwrap());
    }

    #[test]
    fn a_block_that_a_route_leads_into_is_passed_over() {
        let instance: InstanceId = "abcde".parse().unwrap();
        let first = candidates(instance, &[]).next().unwrap();
        let within = Taken { block: Block::new(first.address(), 32), is_claim: true };
        let second = candidates(instance, &[within]).next().unwrap();
        assert!(!second.overlaps(first));
        assert!(candidates(instance, &taken_blocks(&["10.0.0.0/8"])).next().unwrap().overlaps("172.16.0.0/12".parse().unwrap()));
        assert_eq!(candidates(instance, &taken_blocks(&["0.0.0.0/1", "128.0.0.0/1"])).next(), Some(first));
        assert_eq!(candidates(instance, &taken_blocks(&["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"])).next(), None);
    }

    #[test]
    fn a_plan_gives_every_slot_an_address_of_its_own() {
        let plan = AddressPlan { subnet: "10.130.0.0/29".parse().unwrap() };
        assert_eq!((plan.host(), plan.slots()), (Ipv4Addr::new(10, 130, 0, 1), 5));
        assert_eq!((plan.slot(0), plan.slot(4)), (Ipv4Addr::new(10, 130, 0, 2), Ipv4Addr::new(10, 130, 0, 6)));
    }
}
