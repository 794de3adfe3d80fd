//! Which addresses a URL of a client's may lead to: those of the public internet, and those that the configuration allows
//! beside them. A server that fetches what it is told to is otherwise a way into whatever network it stands in.

use crate::model::EgressTarget;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether an address may be connected to.
pub(super) fn is_allowed(address: IpAddr, allow: &[EgressTarget]) -> bool {
    is_public(address) || allow.iter().any(|target| contains(target, plain(address)))
}

/// An IPv4 address that is written as an IPv6 one is an IPv4 address.
fn plain(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
    }
}

fn is_public(address: IpAddr) -> bool {
    match plain(address) {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let is_special = a == 0
        || a == 10
        || a == 127
        || a >= 224
        || (a, b) == (169, 254)
        || (a, b) == (192, 168)
        || (a == 172 && (16..32).contains(&b))
        // Carrier-grade NAT, which overlay networks of machines use.
        || (a == 100 && (64..128).contains(&b))
        // Benchmarks, and addresses of protocols.
        || (a == 198 && (18..20).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || address.is_documentation();
    !is_special
}

/// Global unicast alone, without those that carry an IPv4 address somewhere else.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.segments();
    let is_global = (0x2000..0x4000).contains(&first);
    let is_documentation = (first, second) == (0x2001, 0xdb8);
    let is_tunnel = first == 0x2002 || (first, second) == (0x2001, 0);
    is_global && !is_documentation && !is_tunnel
}

fn contains(target: &EgressTarget, address: IpAddr) -> bool {
    match (target, address) {
        (EgressTarget::Block { address: IpAddr::V4(block), prefix }, IpAddr::V4(v4)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(*prefix).min(32)).unwrap_or(0);
            (u32::from(*block) ^ u32::from(v4)) & mask == 0
        }
        (EgressTarget::Block { address: IpAddr::V6(block), prefix }, IpAddr::V6(v6)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(*prefix).min(128)).unwrap_or(0);
            (u128::from(*block) ^ u128::from(v6)) & mask == 0
        }
        (EgressTarget::Block { .. } | EgressTarget::Domain(_), _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(address: &str, allow: &[&str]) -> bool {
        let allow: Vec<EgressTarget> = allow.iter().map(|block| block.parse().unwrap()).collect();
        is_allowed(address.parse().unwrap(), &allow)
    }

    #[test]
    fn the_public_internet_is_allowed_and_nothing_else() {
        for address in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1", "::ffff:8.8.8.8"] {
            assert!(allowed(address, &[]), "{address}");
        }
        for address in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "192.0.0.1",
            "203.0.113.7",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
        ] {
            assert!(!allowed(address, &[]), "{address}");
        }
    }

    #[test]
    fn what_the_configuration_names_is_allowed_too() {
        assert!(allowed("127.0.0.1", &["127.0.0.0/8"]) && allowed("::ffff:127.0.0.1", &["127.0.0.1"]));
        assert!(!allowed("10.0.0.1", &["10.0.1.0/24", "example.com"]) && allowed("10.0.1.255", &["10.0.1.0/24"]));
        assert!(allowed("fd00::5", &["fd00::/64"]) && !allowed("fd00:0:0:1::5", &["fd00::/64"]));
        assert!(allowed("192.168.0.1", &["0.0.0.0/0"]));
    }
}
