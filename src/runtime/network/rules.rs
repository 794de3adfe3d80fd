//! The rules as values: what the host, a slot and a policy look like in nft. Pure; golden files beside it.

use super::nft::{self, Expr, Hook, Transaction, accept, comes_from, destination, drop, goes_to, goto, in_set, is, is_not, jump, source};
use crate::model::{EgressTarget, InstanceId, NetworkPolicy};
use nftables::types::{NfChainPolicy, NfChainType, NfHook};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// The slot's end of the link to the host.
pub(super) const SLOT_OUTER_LINK: &str = "up";
/// Where the responder of a slot listens.
pub(super) const DNS_PORT: u16 = 53;
/// Where the gate of a slot listens; nothing can be addressed to it, only redirected.
pub(super) const GATE_PORT: u16 = 15_443;
/// Ports whose traffic names its destination: HTTP's Host and TLS's SNI (E2B's rule for domains).
pub(super) const NAMED_PORTS: [u16; 2] = [80, 443];
/// The resolver that E2B allows implicitly; its questions are answered by the slot's own.
pub(super) const IMPLICIT_RESOLVER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// Connections that one sandbox may have open: the host's conntrack table (65536 by default) is everybody's.
const CONNECTIONS_MAX: u32 = 4096;

/// Before the usual filters (0), so that what we refuse costs them nothing.
const FILTER_PRIORITY: i32 = -5;
const DSTNAT_PRIORITY: i32 = -100;
const SRCNAT_PRIORITY: i32 = 100;

/// Never an outside destination: this net, loopback, link-local with the clouds' metadata services, IETF protocol
/// assignments (Oracle's metadata), multicast, reserved, broadcast; and Azure's wire server.
const NEVER: [(Ipv4Addr, u8); 7] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];
/// RFC 1918, and RFC 6598 where providers and overlay networks live.
const PRIVATE: [(Ipv4Addr, u8); 4] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
];

/// An IPv4 CIDR block; the bits behind the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    address: Ipv4Addr,
    prefix: u8,
}

/// The text was no IPv4 block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("is no IPv4 block such as 10.130.0.0/20")]
pub(super) struct ParseBlockError;

impl Block {
    /// The block of `address`; a prefix over 32 counts as 32.
    pub(super) fn new(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { address: Ipv4Addr::from(u32::from(address) & mask(prefix)), prefix }
    }

    pub(super) fn prefix(self) -> u8 {
        self.prefix
    }

    pub(super) fn first(self) -> u32 {
        u32::from(self.address)
    }

    pub(super) fn last(self) -> u32 {
        self.first() | !mask(self.prefix)
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first() <= other.last() && other.first() <= self.last()
    }

    pub(super) fn address(self) -> Ipv4Addr {
        self.address
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl FromStr for Block {
    type Err = ParseBlockError;
    fn from_str(text: &str) -> Result<Self, ParseBlockError> {
        match text.parse() {
            Ok(EgressTarget::Block { address: IpAddr::V4(address), prefix }) => Ok(Self::new(address, prefix)),
            _ => Err(ParseBlockError),
        }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Name of an instance's table, on the host and in each of its slots.
pub(super) fn table_name(instance: InstanceId) -> String {
    format!("stillbox_{instance}")
}

/// What all host links of an instance begin with.
pub(super) fn link_prefix(instance: InstanceId) -> String {
    format!("sb{instance}")
}

/// What the host does with packets of this instance's slots.
#[derive(Debug, Clone)]
pub(super) struct HostRules<'a> {
    pub(super) instance: InstanceId,
    /// Outer addresses of all slots.
    pub(super) subnet: Block,
    /// Blocks within the private ones that may be reached; `None`: all of them may.
    pub(super) private_exceptions: Option<&'a [Block]>,
}

impl HostRules<'_> {
    /// The table as it has to be, replacing what is there.
    pub(super) fn transaction(&self) -> Transaction {
        let ours = format!("{}*", link_prefix(self.instance));
        let mut table = Transaction::anew(&table_name(self.instance));
        refusal(&mut table);
        self.forward(&mut table, &ours);
        // Nothing of the host itself is served on these links: what a sandbox needs is served inside its slot.
        table.base_chain("input", filter(NfHook::Input, NfChainPolicy::Accept));
        table.rule("input", vec![comes_from(&ours), goto("refuse")]);
        table.base_chain("postrouting", nat(NfHook::Postrouting, SRCNAT_PRIORITY));
        let from_slots = is(source(), nft::block(self.subnet.address, self.subnet.prefix));
        table.rule("postrouting", vec![from_slots, nft::goes_elsewhere_than("sb*"), nft::masquerade()]);
        table
    }

    fn forward(&self, table: &mut Transaction, ours: &str) {
        keep_in_reach(table, self.private_exceptions);
        table.chain("outbound");
        table.rule("outbound", vec![nft::is_no_ipv4(), drop()]);
        table.rule("outbound", vec![is_not(source(), nft::block(self.subnet.address, self.subnet.prefix)), drop()]);
        table.rule("outbound", vec![nft::belongs_to_connection(), accept()]);
        // Slots of this instance and of every other one.
        table.rule("outbound", vec![goes_to("sb*"), goto("refuse")]);
        table.rule("outbound", vec![jump("reach")]);
        table.rule("outbound", vec![accept()]);
        table.chain("inbound");
        table.rule("inbound", vec![nft::belongs_to_connection(), accept()]);
        // From a slot of another instance, whose table may come after this one.
        table.rule("inbound", vec![comes_from("sb*"), goto("refuse")]);
        table.rule("inbound", vec![drop()]);
        table.base_chain("forward", filter(NfHook::Forward, NfChainPolicy::Accept));
        table.rule("forward", vec![comes_from(ours), goto("outbound")]);
        table.rule("forward", vec![goes_to(ours), goto("inbound")]);
    }
}

/// What a slot's own table needs to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotRules<'a> {
    pub(super) instance: InstanceId,
    /// The sandbox's address, the only source there may be.
    pub(super) inner: Ipv4Addr,
    /// The slot's address towards the sandbox: what is sent there is never redirected.
    pub(super) gateway: Ipv4Addr,
    /// Where the server's public URLs are served to it.
    pub(super) front_port: Option<u16>,
    /// The slot's name on the link to the sandbox.
    pub(super) inner_link: &'a str,
    /// As in [`HostRules`]: kept here as well, in case somebody flushes the host's rules.
    pub(super) private_exceptions: Option<&'a [Block]>,
}

impl SlotRules<'_> {
    /// A slot's whole table, with the rules of a policy that says nothing: everything may leave.
    pub(super) fn transaction(&self) -> Transaction {
        let mut table = Transaction::anew(&table_name(self.instance));
        refusal(&mut table);
        keep_in_reach(&mut table, self.private_exceptions);
        self.forward(&mut table);
        self.input(&mut table);
        table.chain("redirects");
        table.base_chain("prerouting", nat(NfHook::Prerouting, DSTNAT_PRIORITY));
        let beyond_the_gateway = is_not(destination(), nft::text(self.gateway));
        table.rule("prerouting", vec![self.comes_from_sandbox(), beyond_the_gateway, jump("redirects")]);
        table.base_chain("postrouting", nat(NfHook::Postrouting, SRCNAT_PRIORITY));
        table.rule("postrouting", vec![goes_to(SLOT_OUTER_LINK), nft::masquerade()]);
        fill_policy(&mut table, &NetworkPolicy::default());
        table
    }

    fn comes_from_sandbox(&self) -> nft::Stmt {
        comes_from(self.inner_link)
    }

    fn forward(&self, table: &mut Transaction) {
        table.chain("egress");
        table.base_chain("forward", filter(NfHook::Forward, NfChainPolicy::Drop));
        table.rule("forward", vec![comes_from(SLOT_OUTER_LINK), nft::belongs_to_connection(), accept()]);
        table.rule("forward", vec![nft::is_no_ipv4(), drop()]);
        table.rule("forward", vec![self.comes_from_sandbox(), is_not(source(), nft::text(self.inner)), drop()]);
        // A new policy holds for new connections; those that are open go on.
        table.rule("forward", vec![self.comes_from_sandbox(), nft::belongs_to_connection(), accept()]);
        table.rule("forward", vec![self.comes_from_sandbox(), nft::opens_connection(), nft::connections_over(CONNECTIONS_MAX), drop()]);
        table.rule("forward", vec![self.comes_from_sandbox(), jump("reach")]);
        table.rule("forward", vec![self.comes_from_sandbox(), goes_to(SLOT_OUTER_LINK), goto("egress")]);
        // What the gate connects to for the sandbox.
        table.base_chain("output", filter(NfHook::Output, NfChainPolicy::Accept));
        table.rule("output", vec![goes_to(SLOT_OUTER_LINK), jump("reach")]);
    }

    fn input(&self, table: &mut Transaction) {
        table.chain("services");
        table.rule("services", vec![is_not(source(), nft::text(self.inner)), drop()]);
        for protocol in ["udp", "tcp"] {
            table.rule("services", vec![is(nft::port_of(protocol), nft::Expr::Number(DNS_PORT.into())), accept()]);
        }
        table.rule("services", vec![is(nft::port_of("tcp"), nft::Expr::Number(GATE_PORT.into())), nft::was_redirected(), accept()]);
        if let Some(port) = self.front_port {
            table.rule("services", vec![is(nft::port_of("tcp"), nft::Expr::Number(port.into())), accept()]);
        }
        table.rule("services", vec![nft::is_ping(), accept()]);
        table.rule("services", vec![goto("refuse")]);
        table.base_chain("input", filter(NfHook::Input, NfChainPolicy::Drop));
        table.rule("input", vec![nft::is_no_ipv4(), drop()]);
        table.rule("input", vec![comes_from("lo"), accept()]);
        table.rule("input", vec![nft::belongs_to_connection(), accept()]);
        table.rule("input", vec![self.comes_from_sandbox(), goto("services")]);
    }
}

/// Replaces the policy of a slot in one step: allow beats deny, and a policy of domains sends what names its
/// destination through the gate.
pub(super) fn policy_transaction(instance: InstanceId, policy: &NetworkPolicy) -> Transaction {
    let mut table = Transaction::on(&table_name(instance));
    for chain in ["egress", "redirects"] {
        table.flush_chain(chain);
    }
    fill_policy(&mut table, policy);
    table
}

/// What a policy's blocks come down to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Egress {
    /// `0.0.0.0/0` is allowed, which beats every denial.
    Everything,
    #[default]
    AllButDenied,
    OnlyAllowed,
}

/// Which addresses a policy lets a sandbox reach, names and the host's own refusals aside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Addresses {
    allowed: Vec<Block>,
    denied: Vec<Block>,
    egress: Egress,
}

impl Addresses {
    pub(super) fn of(policy: &NetworkPolicy) -> Self {
        let mut allowed = blocks(&policy.allow_out);
        if has_domains(policy) {
            allowed.extend(policy.dns_servers.iter().flatten().map(|server| Block::new(*server, 32)));
        }
        let denied = blocks(&policy.deny_out);
        let is_everything = |block: &Block| block.prefix == 0;
        let egress = if allowed.iter().any(is_everything) {
            Egress::Everything
        } else if policy.denies_everything() || denied.iter().any(is_everything) {
            Egress::OnlyAllowed
        } else {
            Egress::AllButDenied
        };
        Self { allowed: without_everything(&allowed), denied: without_everything(&denied), egress }
    }

    pub(super) fn admit(&self, address: Ipv4Addr) -> bool {
        let has = |blocks: &[Block]| blocks.iter().any(|block| (block.first()..=block.last()).contains(&u32::from(address)));
        match self.egress {
            Egress::Everything => true,
            Egress::AllButDenied => has(&self.allowed) || !has(&self.denied),
            Egress::OnlyAllowed => has(&self.allowed),
        }
    }
}

fn fill_policy(table: &mut Transaction, policy: &NetworkPolicy) {
    let Addresses { allowed, denied, egress } = Addresses::of(policy);
    table.address_set("allowed", ranges(&allowed));
    table.address_set("denied", ranges(&denied));
    table.rule("egress", vec![is(destination(), in_set("allowed")), accept()]);
    match egress {
        Egress::Everything => table.rule("egress", vec![accept()]),
        Egress::AllButDenied => {
            table.rule("egress", vec![is(destination(), in_set("denied")), goto("refuse")]);
            table.rule("egress", vec![accept()]);
        }
        Egress::OnlyAllowed => table.rule("egress", vec![goto("refuse")]),
    }
    if has_domains(policy) {
        redirect_named(table, policy);
    }
    if policy.egress_proxy.is_some() {
        redirect_allowed(table, egress, || nft::protocol("tcp"));
    } else if policy.changes_requests() {
        redirect_allowed(table, egress, || is(nft::port_of("tcp"), named_ports()));
    }
}

fn named_ports() -> Expr {
    nft::any_of(NAMED_PORTS.map(|port| Expr::Number(port.into())))
}

fn redirect_named(table: &mut Transaction, policy: &NetworkPolicy) {
    let implicit = policy.dns_servers.is_none();
    for protocol in ["udp", "tcp"].into_iter().filter(|_| implicit) {
        let to_dns = is(nft::port_of(protocol), Expr::Number(DNS_PORT.into()));
        table.rule("redirects", vec![is(destination(), nft::text(IMPLICIT_RESOLVER)), to_dns, nft::redirect_to(DNS_PORT)]);
    }
    let is_named = is(nft::port_of("tcp"), named_ports());
    table.rule("redirects", vec![is_not(destination(), in_set("allowed")), is_named, nft::redirect_to(GATE_PORT)]);
}

/// What may leave leaves through the gate; what may not is left to the refusals of `egress`.
fn redirect_allowed(table: &mut Transaction, egress: Egress, which: impl Fn() -> nft::Stmt) {
    let to_gate = || vec![which(), nft::redirect_to(GATE_PORT)];
    table.rule("redirects", [vec![is(destination(), in_set("allowed"))], to_gate()].concat());
    match egress {
        Egress::Everything => table.rule("redirects", to_gate()),
        Egress::AllButDenied => {
            table.rule("redirects", [vec![is_not(destination(), in_set("denied"))], to_gate()].concat());
        }
        Egress::OnlyAllowed => {}
    }
}

/// Whether names decide: then questions are filtered and the gate is in the way.
pub(super) fn has_domains(policy: &NetworkPolicy) -> bool {
    policy.allow_out.iter().any(|target| matches!(target, EgressTarget::Domain(_)))
}

/// The chain `reach`: refuses destinations that are nobody's business in a sandbox and returns for the others.
fn keep_in_reach(table: &mut Transaction, private_exceptions: Option<&[Block]>) {
    table.chain("reach");
    table.address_set("never", NEVER.map(|(address, prefix)| nft::block(address, prefix)).to_vec());
    table.rule("reach", vec![is(destination(), in_set("never")), goto("refuse")]);
    if let Some(exceptions) = private_exceptions {
        table.address_set("private", PRIVATE.map(|(address, prefix)| nft::block(address, prefix)).to_vec());
        table.address_set("reachable", ranges(exceptions));
        let is_unreachable = is_not(destination(), in_set("reachable"));
        table.rule("reach", vec![is(destination(), in_set("private")), is_unreachable, goto("refuse")]);
    }
}

fn refusal(table: &mut Transaction) {
    // At once and with a reason: a program that is told so does not hang until its own timeout.
    table.chain("refuse");
    table.rule("refuse", vec![nft::protocol("tcp"), nft::reset_connection()]);
    table.rule("refuse", vec![nft::reject()]);
}

fn filter(at: NfHook, policy: NfChainPolicy) -> Hook {
    Hook { kind: NfChainType::Filter, at, priority: FILTER_PRIORITY, policy }
}

fn nat(at: NfHook, priority: i32) -> Hook {
    Hook { kind: NfChainType::NAT, at, priority, policy: NfChainPolicy::Accept }
}

/// The IPv4 blocks among targets. IPv6 ones need no rule: nothing in a slot speaks it.
fn blocks(targets: &[EgressTarget]) -> Vec<Block> {
    let block = |target: &EgressTarget| match target {
        EgressTarget::Block { address: IpAddr::V4(address), prefix } => Some(Block::new(*address, *prefix)),
        EgressTarget::Block { address: IpAddr::V6(_), .. } | EgressTarget::Domain(_) => None,
    };
    targets.iter().filter_map(block).collect()
}

fn without_everything(blocks: &[Block]) -> Vec<Block> {
    blocks.iter().copied().filter(|block| block.prefix != 0).collect()
}

/// Blocks as set elements that do not overlap, because nft refuses those that do.
fn ranges(blocks: &[Block]) -> Vec<Expr> {
    let mut sorted: Vec<(u32, u32)> = blocks.iter().map(|block| (block.first(), block.last())).collect();
    sorted.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(sorted.len());
    for (first, last) in sorted {
        match merged.last_mut() {
            Some(previous) if first <= previous.1.saturating_add(1) => previous.1 = previous.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged.into_iter().map(|(first, last)| nft::range(first.into(), last.into())).collect()
}

#[cfg(test)]
mod tests;
