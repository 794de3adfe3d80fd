//! Names, and the gate where names or a proxy decide.

use super::internet::{PROXY, ask_name, ask_name_tcp};
use super::world::{EIGHT, HOST, LAN_MACHINE, NINE, ONE, Sandbox, in_own_world, say};
use super::{no_internet, open, policy};
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use stillbox::model::{EgressProxy, NetworkPolicy};

const REFUSED: u8 = 5;

fn name_server(resolv_conf: &str) -> Ipv4Addr {
    resolv_conf.lines().find_map(|line| line.strip_prefix("nameserver ")).unwrap().parse().unwrap()
}

#[test]
fn names_resolve_by_the_server_in_resolv_conf_over_udp_and_tcp() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let server = name_server(&network.resolv_conf());
        let sandbox = world.sandbox(&network, &open()).await;
        assert_eq!(sandbox.netns.run(|| ask_name(server, "one.example")).unwrap(), Ok(ONE));
        assert_eq!(sandbox.netns.run(|| ask_name_tcp(server, "nine.example")).unwrap(), Ok(NINE));
        assert_eq!(sandbox.netns.run(|| ask_name(server, "nobody.example")).unwrap(), Err(3), "the resolver's own answer");
        assert_eq!(sandbox.netns.run(|| ask_name(EIGHT, "one.example")).unwrap(), Ok(ONE), "others may be asked, too");
    });
}

#[test]
fn without_internet_no_question_leaves() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let server = name_server(&network.resolv_conf());
        let sandbox = world.sandbox(&network, &no_internet()).await;
        assert_eq!(sandbox.netns.run(|| ask_name(server, "one.example")).unwrap(), Err(REFUSED));
        assert!(sandbox.netns.run(|| ask_name(EIGHT, "one.example")).is_err());
        network.set_policy(sandbox.lease.slot, &open()).await.unwrap();
        assert_eq!(sandbox.netns.run(|| ask_name(server, "one.example")).unwrap(), Ok(ONE));
    });
}

fn request(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

fn client_hello(name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

/// What the sandbox is answered when it says `words` to `address`.
fn tell(sandbox: &Sandbox, address: Ipv4Addr, port: u16, words: &[u8]) -> io::Result<String> {
    sandbox.netns.run(|| say((address, port).into(), words))
}

#[test]
fn an_allowed_name_is_reached_by_http_and_tls_and_no_other() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &policy(&["one.example", "*.wild.example"], &["0.0.0.0/0"])).await;
        let reached = Some(format!("{HOST} {ONE}"));
        assert_eq!(tell(&sandbox, ONE, 80, &request("one.example")).ok(), reached);
        assert_eq!(tell(&sandbox, ONE, 443, &client_hello("one.example")).ok(), reached);
        assert_eq!(tell(&sandbox, NINE, 80, &request("One.Example:80")).ok(), reached, "the name decides, not the address");

        let nothing = |outcome: io::Result<String>| outcome.map_or(true, |answer| answer.is_empty());
        assert!(nothing(tell(&sandbox, ONE, 80, &request("nine.example"))));
        assert!(nothing(tell(&sandbox, ONE, 443, &client_hello("nine.example"))));
        assert!(nothing(tell(&sandbox, ONE, 443, &request("wild.example"))));
        assert!(sandbox.ask_port(ONE, 8080).is_err(), "names decide on ports 80 and 443 alone");
        assert!(tell(&sandbox, network.resolv_conf().split(' ').nth(1).unwrap().trim().parse().unwrap(), 15443, b"?").is_err());

        let server = name_server(&network.resolv_conf());
        for server in [server, EIGHT] {
            assert_eq!(sandbox.netns.run(|| ask_name(server, "one.example")).unwrap(), Ok(ONE));
            assert_eq!(sandbox.netns.run(|| ask_name(server, "nine.example")).unwrap(), Err(REFUSED));
        }
    });
}

#[test]
fn name_servers_of_a_policy_of_names_are_reached_and_take_the_usual_ones_place() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let own = name_server(&network.resolv_conf());
        let names =
            |servers: &[Ipv4Addr]| NetworkPolicy { dns_servers: Some(servers.to_vec()), ..policy(&["one.example"], &["0.0.0.0/0"]) };
        let sandbox = world.sandbox(&network, &names(&[EIGHT, LAN_MACHINE])).await;
        let asked = |server: Ipv4Addr, name: &'static str| sandbox.netns.run(|| ask_name(server, name)).ok();
        assert_eq!(asked(EIGHT, "nine.example"), Some(Ok(NINE)), "it is asked itself, and for anything");
        assert_eq!(sandbox.ask_port(EIGHT, 80).unwrap(), HOST, "all traffic to it is allowed");
        assert!(sandbox.ask_port(LAN_MACHINE, 80).is_err(), "and nothing of what the operator keeps out of reach");
        assert_eq!((asked(own, "one.example"), asked(own, "nine.example")), (Some(Ok(ONE)), Some(Err(REFUSED))));

        network.set_policy(sandbox.lease.slot, &names(&[])).await.unwrap();
        assert_eq!((asked(own, "one.example"), asked(EIGHT, "one.example")), (Some(Err(REFUSED)), None), "none at all");
        assert_eq!(tell(&sandbox, NINE, 80, &request("one.example")).unwrap(), format!("{HOST} {ONE}"), "names still lead there");
        network
            .set_policy(sandbox.lease.slot, &NetworkPolicy { dns_servers: Some(vec![NINE]), ..policy(&[], &["0.0.0.0/0"]) })
            .await
            .unwrap();
        assert!(sandbox.ask(NINE).is_err(), "without names it says nothing");
    });
}

#[test]
fn an_address_beside_names_needs_no_name() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &policy(&["one.example", "9.9.9.9"], &["0.0.0.0/0"])).await;
        assert_eq!(sandbox.ask(NINE).unwrap(), HOST);
        assert!(sandbox.ask(EIGHT).is_err());
    });
}

#[test]
fn a_name_that_leads_to_the_lan_or_the_host_gets_nowhere() {
    in_own_world(async |world| {
        super::world::serve("0.0.0.0:80");
        let network = world.network("aaaaa").await;
        let sandbox = world.sandbox(&network, &policy(&["lan.example", "host.example"], &["0.0.0.0/0"])).await;
        for name in ["lan.example", "host.example"] {
            let outcome = tell(&sandbox, ONE, 80, &request(name));
            assert!(outcome.as_ref().map_or(true, String::is_empty), "{name} answered {outcome:?}");
        }
    });
}

#[test]
fn all_tcp_that_may_leave_leaves_through_the_proxy() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let egress_proxy = Some(EgressProxy { address: PROXY.to_owned(), username: None, password: None });
        let through = |policy: NetworkPolicy| NetworkPolicy { egress_proxy: egress_proxy.clone(), ..policy };
        let sandbox = world.sandbox(&network, &through(policy(&[], &["9.9.9.9"]))).await;
        assert_eq!(tell(&sandbox, ONE, 80, b"?").unwrap(), format!("{ONE} by proxy"));
        assert_eq!(tell(&sandbox, EIGHT, 2222, b"?").unwrap(), format!("{EIGHT} by proxy"));
        assert!(tell(&sandbox, NINE, 80, b"?").is_err(), "denied is denied");

        let names = through(policy(&["one.example", "9.9.9.9"], &["0.0.0.0/0"]));
        network.set_policy(sandbox.lease.slot, &names).await.unwrap();
        assert_eq!(tell(&sandbox, ONE, 443, &client_hello("one.example")).unwrap(), "one.example by proxy");
        assert_eq!(tell(&sandbox, NINE, 25, b"?").unwrap(), format!("{NINE} by proxy"));
        assert!(tell(&sandbox, EIGHT, 25, b"?").is_err());
    });
}

#[test]
fn a_policy_that_cannot_be_enforced_is_refused_by_the_fields_name() {
    in_own_world(async |world| {
        let network = world.network("aaaaa").await;
        let header = stillbox::model::HeaderRule { headers: [("a".to_owned(), "b".to_owned())].into() };
        let policy = NetworkPolicy { rules: [("one.example".to_owned(), header)].into(), ..open() };
        let error = network.lease(stillbox::model::SandboxId::random(), &policy).await.unwrap_err();
        assert_eq!(error.to_string(), "network.rules is not supported by this server");
    });
}
