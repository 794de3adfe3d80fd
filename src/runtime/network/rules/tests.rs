//! Golden rule sets beside this file, one object per line, and the arithmetic of blocks.

use super::*;
use crate::model::{EgressProxy, HeaderRule};
use crate::runtime::network::inner::SLOT_INNER_LINK;
use nftables::schema::Nftables;
use std::collections::BTreeMap;

fn instance() -> InstanceId {
    "abcde".parse().unwrap()
}

fn slot() -> SlotRules<'static> {
    let (inner, gateway) = (Ipv4Addr::new(10, 254, 0, 2), Ipv4Addr::new(10, 254, 0, 1));
    SlotRules { instance: instance(), inner, gateway, front_port: None, inner_link: SLOT_INNER_LINK.0, private_exceptions: Some(&[]) }
}

fn policy(allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    let targets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    NetworkPolicy { allow_out: targets(allow), deny_out: targets(deny), ..NetworkPolicy::default() }
}

/// Compared as values: `UPDATE_GOLDEN` in the message tells how to accept a change.
fn assert_golden(name: &str, golden: &str, ruleset: &Nftables<'_>) {
    let actual = serde_json::to_value(ruleset).unwrap();
    let expected: serde_json::Value = serde_json::from_str(golden).unwrap();
    assert!(actual == expected, "src/runtime/network/rules/{name} should now be:\n{}", serde_json::to_string_pretty(&actual).unwrap());
}

#[test]
fn the_hosts_table_is_as_written_down() {
    let exceptions = ["192.168.7.0/24".parse().unwrap()];
    let rules = HostRules { instance: instance(), subnet: "10.130.16.0/20".parse().unwrap(), private_exceptions: Some(&exceptions) };
    assert_golden("host.json", include_str!("host.json"), &rules.transaction().into_ruleset());
}

#[test]
fn a_slots_table_is_as_written_down() {
    assert_golden("slot.json", include_str!("slot.json"), &slot().transaction().into_ruleset());
}

#[test]
fn the_servers_own_port_is_open_to_the_sandbox_and_nothing_else_changes() {
    let rules = |front_port| {
        let table = SlotRules { front_port, ..slot() }.transaction().into_ruleset();
        serde_json::to_value(table).unwrap()["nftables"].as_array().unwrap().clone()
    };
    let (without, with) = (rules(None), rules(Some(3443)));
    let added: Vec<_> = with.iter().filter(|rule| !without.contains(rule)).collect();
    assert!(added.len() == 1 && added[0].to_string().contains("3443"), "{added:?}");
}

#[test]
fn a_policy_of_blocks_is_as_written_down() {
    let policy = policy(&["1.1.1.1", "1.1.1.0/24", "8.8.8.8"], &["0.0.0.0/0", "9.9.9.9"]);
    assert_golden("blocks.json", include_str!("blocks.json"), &policy_transaction(instance(), &policy).into_ruleset());
}

#[test]
fn a_policy_of_domains_is_as_written_down() {
    let policy = policy(&["*.example.com", "1.1.1.1"], &["0.0.0.0/0"]);
    assert_golden("domains.json", include_str!("domains.json"), &policy_transaction(instance(), &policy).into_ruleset());
}

#[test]
fn a_policy_with_a_proxy_is_as_written_down() {
    let egress_proxy = Some(EgressProxy { address: "proxy.example:1080".to_owned(), username: None, password: None });
    let policy = NetworkPolicy { egress_proxy, ..policy(&[], &["9.9.9.9"]) };
    assert_golden("proxy.json", include_str!("proxy.json"), &policy_transaction(instance(), &policy).into_ruleset());
}

#[test]
fn a_policy_that_changes_requests_leads_what_names_its_destination_through_the_gate() {
    let rule = HeaderRule { headers: [("x-token".to_owned(), "s".to_owned())].into() };
    let policy = NetworkPolicy { rules: [("api.example.com".to_owned(), rule)].into(), ..policy(&[], &["9.9.9.9"]) };
    let redirects = |policy: &NetworkPolicy| {
        let ruleset = serde_json::to_value(policy_transaction(instance(), policy).into_ruleset()).unwrap();
        let ruleset = ruleset["nftables"].as_array().unwrap().clone();
        ruleset.into_iter().map(|rule| rule.to_string()).filter(|rule| rule.contains("redirect\"")).collect::<Vec<_>>()
    };
    let led = redirects(&policy);
    assert!(led.len() == 2 && led.iter().all(|rule| rule.contains("443") && rule.contains("15443")), "{led:?}");
    assert!(!led.join("").contains("9.9.9.9") && led[1].contains("@denied"), "what is denied is left to be refused");
    assert!(redirects(&NetworkPolicy { rules: BTreeMap::new(), ..policy }).is_empty());
}

#[test]
fn addresses_are_admitted_as_the_kernel_admits_them() {
    let admitted = |allow: &[&str], deny: &[&str]| {
        let addresses = Addresses::of(&policy(allow, deny));
        ["1.1.1.1", "9.9.9.9", "8.8.8.8"].map(|address| addresses.admit(address.parse().unwrap()))
    };
    assert_eq!(admitted(&[], &[]), [true, true, true]);
    assert_eq!(admitted(&[], &["9.9.9.0/24"]), [true, false, true]);
    assert_eq!(admitted(&["9.9.9.9"], &["9.9.9.0/24", "8.0.0.0/8"]), [true, true, false]);
    assert_eq!(admitted(&["1.1.1.1", "a.com"], &["0.0.0.0/0"]), [true, false, false]);
    assert_eq!(admitted(&["0.0.0.0/0"], &["9.9.9.9"]), [true, true, true]);
}

#[test]
fn blocks_that_touch_or_overlap_become_one_range() {
    let blocks: Vec<Block> = ["10.0.1.0/24", "10.0.0.0/24", "10.0.0.7", "10.0.3.0/24"].iter().map(|text| text.parse().unwrap()).collect();
    assert_eq!(
        ranges(&blocks),
        [
            nft::range(Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::new(10, 0, 1, 255)),
            nft::range(Ipv4Addr::new(10, 0, 3, 0), Ipv4Addr::new(10, 0, 3, 255)),
        ]
    );
}

#[test]
fn a_block_ends_where_its_prefix_says() {
    let block: Block = "10.1.2.3/20".parse().unwrap();
    assert_eq!(block.to_string(), "10.1.0.0/20");
    assert_eq!(Ipv4Addr::from(block.last()), Ipv4Addr::new(10, 1, 15, 255));
    assert_eq!(Block::new(Ipv4Addr::UNSPECIFIED, 0).last(), u32::MAX);
    assert!(block.overlaps("10.1.15.0/24".parse().unwrap()) && !block.overlaps("10.1.16.0/24".parse().unwrap()));
    assert_eq!("fd00::/8".parse::<Block>(), Err(ParseBlockError));
}
