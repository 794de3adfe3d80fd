//! Networks of sandboxes, each test in a host netns of its own with an internet that it made itself.

mod intercept;
mod internet;
mod names;
mod streams;
mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use stillbox::model::{EgressTarget, NetworkPolicy, SandboxId};
use stillbox::runtime::network::{NetworkConfig, NetworkError};
use stillbox::sys::netns::Netns;
use world::{EIGHT, HOST, HOST_LAN, LAN_MACHINE, METADATA, NINE, ONE, in_own_world, ip, nft, run, serve, traces};

fn open() -> NetworkPolicy {
    NetworkPolicy::default()
}

fn targets(texts: &[&str]) -> Vec<EgressTarget> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn policy(allow: &[&str], deny: &[&str]) -> NetworkPolicy {
    NetworkPolicy { allow_out: targets(allow), deny_out: targets(deny), ..open() }
}

fn no_internet() -> NetworkPolicy {
    NetworkPolicy { allow_internet_access: Some(false), ..open() }
}

#[test]
fn sandboxes_with_the_same_address_reach_the_internet_by_their_hosts() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let one = world.sandbox(&network, &open()).await;
        let two = world.sandbox(&network, &open()).await;
        for sandbox in [&one, &two] {
            assert_eq!(sandbox.ask(ONE).unwrap(), HOST);
            let local = sandbox.connect(EIGHT).unwrap().local_addr().unwrap();
            assert_eq!(local.ip(), network.inner_address());
        }
        assert_ne!(one.lease.slot, two.lease.slot);
    });
}

#[test]
fn a_sandbox_reaches_neither_others_nor_the_host_nor_its_lan_nor_metadata() {
    in_own_world(async |world| {
        serve("0.0.0.0:80");
        let network = world.network("aaaaa").await;
        let elsewhere = world.network("bbbbb").await;
        let sandbox = world.sandbox(&network, &open()).await;
        let neighbour = world.sandbox(&network, &open()).await;
        let stranger = world.sandbox(&elsewhere, &open()).await;
        for other in [&neighbour, &stranger] {
            other.inside(|| serve("0.0.0.0:80"));
        }
        let outer = |instance: &str| {
            let routes = run("ip", &["-o", "route", "show"]);
            let of_slots = routes.lines().filter(|route| route.contains(&format!("dev sb{instance}")));
            of_slots.map(|route| route.split(' ').next().unwrap().parse().unwrap()).collect::<Vec<Ipv4Addr>>()
        };
        let gateways = run("ip", &["-o", "-4", "addr", "show"]);
        let gateways = gateways
            .lines()
            .filter(|line| line.contains(": sb"))
            .map(|line| line.split_whitespace().nth(3).unwrap().split('/').next().unwrap().parse::<Ipv4Addr>().unwrap());
        let slots = [outer("aaaaa"), outer("bbbbb")].concat();
        assert!(slots.len() >= 3);
        for address in slots.into_iter().chain(gateways).chain([HOST, HOST_LAN, LAN_MACHINE, METADATA]) {
            let outcome = sandbox.ask(address).map_err(|error| error.kind());
            assert_eq!(outcome, Err(ErrorKind::ConnectionRefused), "{address}");
        }
        assert_eq!(sandbox.ask(ONE).unwrap(), HOST, "and yet the internet is there");
    });
}

#[test]
fn a_lan_is_reachable_where_the_configuration_says_so() {
    in_own_world(async |world| {
        let except = NetworkConfig { allow_private: vec![format!("{LAN_MACHINE}/32")], ..NetworkConfig::default() };
        let all = NetworkConfig { deny_private: false, ..NetworkConfig::default() };
        for (instance, config) in [("aaaaa", except), ("bbbbb", all)] {
            let network = world.network_with(instance, config).await;
            let sandbox = world.sandbox(&network, &open()).await;
            assert_eq!(sandbox.ask(LAN_MACHINE).unwrap(), HOST);
            for address in [METADATA, HOST_LAN] {
                assert!(sandbox.ask(address).is_err(), "{address} answered");
            }
        }
    });
}

#[test]
fn a_policy_holds_for_new_connections_at_once_and_leaves_open_ones_alone() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &policy(&[], &["9.9.9.0/24"])).await;
        assert_eq!((sandbox.ask(ONE).unwrap(), sandbox.ask(NINE).is_err()), (HOST, true));
        let mut old = sandbox.connect(ONE).unwrap();

        network.set_policy(sandbox.lease.slot, &no_internet()).await.unwrap();
        let refused = sandbox.ask(ONE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "told at once, not by a timeout");
        old.write_all(b"?").unwrap();
        let mut answer = String::new();
        old.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("{HOST} {ONE}"));

        network.set_policy(sandbox.lease.slot, &policy(&["9.9.9.9", "1.1.0.0/16"], &["0.0.0.0/0"])).await.unwrap();
        assert_eq!((sandbox.ask(ONE).unwrap(), sandbox.ask(NINE).unwrap()), (HOST, HOST));
        assert!(sandbox.ask(EIGHT).is_err());

        network.set_policy(sandbox.lease.slot, &policy(&["9.9.9.9"], &["9.9.9.0/24"])).await.unwrap();
        assert_eq!((sandbox.ask(EIGHT).unwrap(), sandbox.ask(NINE).unwrap()), (HOST, HOST), "allow beats deny");

        network.set_policy(sandbox.lease.slot, &open()).await.unwrap();
        assert_eq!(sandbox.ask(EIGHT).unwrap(), HOST);
    });
}

#[test]
fn what_the_operator_keeps_out_of_reach_no_policy_opens() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let everything = policy(&["0.0.0.0/0", &METADATA.to_string(), &LAN_MACHINE.to_string(), &HOST.to_string()], &[]);
        let sandbox = world.sandbox(&network, &everything).await;
        for address in [METADATA, LAN_MACHINE, HOST] {
            assert!(sandbox.ask(address).is_err(), "{address} answered");
        }
        assert_eq!(sandbox.ask(ONE).unwrap(), HOST);
    });
}

#[test]
fn a_packet_with_a_made_up_source_goes_nowhere() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &open()).await;
        let spoofed = Ipv4Addr::new(10, 254, 0, 77);
        sandbox.inside(|| ip(&format!("addr add {spoofed}/32 dev eth0")));
        sandbox.inside(|| ip(&format!("route replace default via 10.254.0.1 src {spoofed}")));
        assert!(sandbox.ask(ONE).is_err());
        sandbox.inside(|| ip("route replace default via 10.254.0.1 src 10.254.0.2"));
        assert_eq!(sandbox.ask(ONE).unwrap(), HOST);
    });
}

#[test]
fn a_recycled_slot_knows_nothing_of_its_last_sandbox() {
    in_own_world(async |world| {
        let network = world.network_with("aaaaa", NetworkConfig { slots_max: 1, ..NetworkConfig::default() }).await;
        let first = world.sandbox(&network, &policy(&[], &["1.1.1.1"])).await;
        assert!(first.ask(ONE).is_err());
        let held = first.connect(NINE).unwrap();
        let pin = first.lease.inner.slot_netns.clone();
        network.release(first.end()).await.unwrap();
        drop(held);

        let lease = world.lease(&network, SandboxId::random(), &open()).await;
        assert_eq!(lease.inner.slot_netns, pin);
        let inspect = || {
            assert_eq!(run("conntrack", &["-L"]), "", "tracked connections");
            assert!(!run("ip", &["link"]).contains("in@"), "the last sandbox's link");
            assert!(!run("nft", &["list", "ruleset"]).contains("1.1.1.1"), "the last sandbox's rules");
            Ok(())
        };
        Netns::open(&pin).unwrap().run(inspect).unwrap();
        assert!(!run("conntrack", &["-L"]).contains("src=10."), "tracked connections on the host");
        network.release(lease.slot).await.unwrap();

        let second = world.sandbox(&network, &open()).await;
        assert_eq!(second.ask(ONE).unwrap(), HOST);
        network.release(second.end()).await.unwrap();
        let third = world.lease(&network, SandboxId::random(), &open()).await;
        assert_eq!(third.inner.slot_netns, pin);
        assert!(!run("conntrack", &["-L"]).contains("src=10."), "the second sandbox's connections on the host");
    });
}

#[test]
fn the_host_dials_what_listens_on_either_loopback_inside() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &no_internet()).await;
        sandbox.inside(|| ["127.0.0.1:8000", "[::1]:8001"].into_iter().for_each(serve));
        for port in [8000, 8001] {
            network.dial(&sandbox.netns, port).await.unwrap();
        }
        let refused = network.dial(&sandbox.netns, 8002).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn two_instances_leave_each_other_alone() {
    in_own_world(async |world| {
        let one = world.network_with("aaaaa", NetworkConfig { pool_slots: 0, ..NetworkConfig::default() }).await;
        let two = world.network("bbbbb").await;
        let sandbox = world.sandbox(&one, &policy(&[], &["9.9.9.9"])).await;
        let before = traces("aaaaa", &world.data_dir("aaaaa"));
        let short_lived = world.sandbox(&two, &open()).await;
        assert_eq!(short_lived.ask(NINE).unwrap(), HOST);
        two.release(short_lived.end()).await.unwrap();
        two.close().await;
        assert_eq!(traces("bbbbb", &world.data_dir("bbbbb")), Vec::<String>::new());
        assert_eq!(traces("aaaaa", &world.data_dir("aaaaa")), before);
        assert_eq!((sandbox.ask(ONE).unwrap(), sandbox.ask(NINE).is_err()), (HOST, true));
    });
}

#[test]
fn nothing_is_left_after_close() {
    in_own_world(async |world| {
        let forwarding = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        let before = (forwarding(), run("ip", &["-4", "route", "show", "table", "all"]), run("nft", &["list", "ruleset"]));
        let network = world.network_with("aaaaa", NetworkConfig { pool_slots: 3, ..NetworkConfig::default() }).await;
        let one = world.sandbox(&network, &open()).await;
        let two = world.sandbox(&network, &policy(&["1.1.1.1"], &["0.0.0.0/0"])).await;
        assert_eq!((one.ask(ONE).unwrap(), two.ask(ONE).unwrap()), (HOST, HOST));
        assert_eq!(forwarding(), "1\n");
        for sandbox in [one, two] {
            network.release(sandbox.end()).await.unwrap();
        }
        network.close().await;
        assert_eq!(traces("aaaaa", &world.data_dir("aaaaa")), Vec::<String>::new());
        assert_eq!((forwarding(), run("ip", &["-4", "route", "show", "table", "all"]), run("nft", &["list", "ruleset"])), before);
        assert!(!run("conntrack", &["-L"]).contains("src=10."), "tracked connections of slots");
    });
}

#[test]
fn the_next_server_takes_over_what_runs_and_sweeps_the_rest() {
    in_own_world(async |world| {
        let (first, server) = world.server("aaaaa").await;
        let kept = world.sandbox(&first, &policy(&[], &["9.9.9.9"])).await;
        let dead = world.sandbox(&first, &open()).await;
        let mut open_connection = kept.connect(ONE).unwrap();
        drop(first);
        tokio::task::block_in_place(|| server.shutdown_timeout(Duration::from_secs(5)));

        let next = world.network("aaaaa").await;
        let lease = next.adopt(kept.lease.slot, kept.id, &policy(&[], &["9.9.9.9"])).await.unwrap();
        assert_eq!(lease, kept.lease);
        assert!(matches!(next.adopt(dead.lease.slot, kept.id, &open()).await, Err(NetworkError::Gone { .. })), "somebody else's slot");
        next.sweep(&[lease.slot]).await.unwrap();
        let dead_link = format!("sbaaaaa{}", dead.lease.slot);
        assert!(!run("ip", &["-br", "link"]).lines().any(|line| line.starts_with(&format!("{dead_link}@"))));
        assert_eq!((kept.ask(ONE).unwrap(), kept.ask(NINE).is_err()), (HOST, true));
        open_connection.write_all(b"?").unwrap();
        let mut answer = String::new();
        open_connection.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("{HOST} {ONE}"));
        next.set_policy(lease.slot, &open()).await.unwrap();
        assert_eq!(kept.ask(NINE).unwrap(), HOST);

        next.close().await;
        assert_eq!(kept.ask(ONE).unwrap(), HOST, "a running sandbox goes on without a server");
        let last = world.network("aaaaa").await;
        last.adopt(kept.lease.slot, kept.id, &policy(&[], &["9.9.9.9"])).await.unwrap();
        assert!(kept.ask(NINE).is_err(), "rules that the caller does not know of are replaced");
        last.release(kept.end()).await.unwrap();
        drop(dead);
        last.close().await;
        assert_eq!(traces("aaaaa", &world.data_dir("aaaaa")), Vec::<String>::new());
    });
}

#[test]
fn a_forward_chain_that_drops_lets_sandboxes_through_until_close() {
    in_own_world(async |world| {
        nft("table inet firewall { chain forward { type filter hook forward priority 0; policy drop; } ; \
             chain late { type filter hook forward priority 10; policy accept; counter reject; } ; }");
        let before = run("nft", &["-s", "list", "ruleset"]);
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &open()).await;
        assert_eq!(sandbox.ask(ONE).unwrap(), HOST);
        network.release(sandbox.end()).await.unwrap();
        network.close().await;
        assert_eq!(run("nft", &["-s", "list", "ruleset"]), before);
    });
}

#[test]
fn forwarding_that_was_on_or_that_others_need_stays_on() {
    in_own_world(async |world| {
        let forwarding = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
        let one = world.network("aaaaa").await;
        let two = world.network("bbbbb").await;
        one.close().await;
        assert_eq!(forwarding(), "1\n", "the second instance needs it");
        two.close().await;
        assert_eq!(forwarding(), "0\n");

        let network = world.network("aaaaa").await;
        nft("table ip nat { chain POSTROUTING { type nat hook postrouting priority srcnat; } ; }");
        network.close().await;
        assert_eq!(forwarding(), "1\n", "somebody who does NAT has come to rely on it");
    });
}

#[test]
fn a_subnet_that_the_host_has_routes_into_is_refused_by_name() {
    in_own_world(async |world| {
        ip("route add 10.77.4.0/24 via 198.51.100.1");
        let open = async |subnet: &str| {
            let config = NetworkConfig { subnet: Some(subnet.to_owned()), ..NetworkConfig::default() };
            stillbox::runtime::network::Network::open(config, world.instance("aaaaa"), &world.data_dir("aaaaa")).await
        };
        for (subnet, problem) in [
            ("10.77.0.0/20", "overlaps 10.77.4.0/24, which is in use here; choose a free block or leave it unset"),
            ("10.254.0.0/24", "overlaps 10.254.0.0/30, which is in use here; choose a free block or leave it unset"),
            ("10.77.16.0/31", "has no room or too much; its prefix has to be 8 to 29"),
            ("fd00::/64", "is no IPv4 block such as 10.130.0.0/20"),
        ] {
            let error = open(subnet).await.unwrap_err();
            assert_eq!(error.to_string(), format!("network.subnet = '{subnet}' {problem}"));
        }
        let network = open("10.77.16.0/29").await.unwrap();
        assert!(run("ip", &["route"]).contains("unreachable 10.77.16.0/29"));
        network.close().await;
    });
}

/// As Docker and ufw leave it, by whichever iptables this machine has; a machine without one has no such chains.
#[test]
fn a_forward_chain_of_iptables_lets_sandboxes_through_until_close() {
    for program in ["iptables-nft", "iptables-legacy"] {
        in_own_world(async move |world| {
            let set_up = std::process::Command::new(program).args(["-P", "FORWARD", "DROP"]).output();
            if !set_up.is_ok_and(|output| output.status.success()) {
                println!("{program} is not to be had here: nothing to get through");
                return;
            }
            let chain = || run(program, &["-S", "FORWARD"]);
            let before = chain();
            let network = world.network("aaaaa").await;
            assert!(chain().contains("stillbox_aaaaa"), "{}", chain());
            let sandbox = world.sandbox(&network, &open()).await;
            assert_eq!(sandbox.ask(ONE).unwrap(), HOST);
            network.release(sandbox.end()).await.unwrap();
            network.close().await;
            assert_eq!(chain(), before);
        });
    }
}

#[test]
fn rules_that_somebody_flushes_come_back_and_meanwhile_nothing_opens() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &open()).await;
        nft("flush ruleset");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        for address in [LAN_MACHINE, METADATA] {
            assert_eq!(sandbox.ask(address).map_err(|error| error.kind()), Err(ErrorKind::ConnectionRefused), "{address}");
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while sandbox.ask(ONE).ok() != Some(HOST) {
            assert!(Instant::now() < deadline, "the way out has not come back");
        }
        assert!(sandbox.ask(HOST).is_err(), "nor has the host's guard");
        network.release(sandbox.end()).await.unwrap();
        network.close().await;
        assert_eq!(traces("aaaaa", &world.data_dir("aaaaa")), Vec::<String>::new());
    });
}
