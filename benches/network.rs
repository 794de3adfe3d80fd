//! What the network costs a create and a dial, in a netns of its own: medians of `ROUNDS`. Needs root.
//!
//! `cargo bench --bench network`; docs/SPECIFICATION.md has the promises.

use std::io;
use std::process::Command;
use std::time::{Duration, Instant};
use stillbox::model::{InstanceId, NetworkPolicy, SandboxId};
use stillbox::runtime::network::{Network, NetworkConfig};
use stillbox::sys::netns::Netns;

const ROUNDS: usize = 40;

/// Times of one step, told at the end.
#[derive(Debug)]
struct Times {
    step: &'static str,
    took: Vec<Duration>,
}

impl Times {
    fn of(step: &'static str) -> Self {
        Self { step, took: Vec::with_capacity(ROUNDS) }
    }

    fn note(&mut self, started: Instant) {
        self.took.push(started.elapsed());
    }

    fn tell(&mut self) {
        self.took.sort_unstable();
        let at = |share: usize| self.took[(self.took.len() - 1) * share / 100].as_secs_f64() * 1e3;
        println!("{:<34} p50 {:>8.3} ms   p90 {:>8.3} ms   min {:>8.3} ms", self.step, at(50), at(90), at(0));
    }
}

fn main() -> io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let folder = tempfile::Builder::new().prefix("network-bench-").tempdir()?;
    runtime.block_on(measure(folder.path())).map_err(io::Error::other)
}

async fn measure(folder: &std::path::Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let pooled = NetworkConfig { pool_slots: 4, ..NetworkConfig::default() };
    let network = Network::open(pooled, InstanceId::random(), &folder.join("pooled")).await?;
    let sandbox = folder.join("sandbox");
    let denied = NetworkPolicy { deny_out: vec!["192.0.2.0/24".parse()?], ..NetworkPolicy::default() };
    let mut lease_attach = Times::of("lease of a pooled slot + attach");
    let (mut leases, mut attaches) = (Times::of("  lease"), Times::of("  attach"));
    let mut dials = Times::of("dial");
    let mut policies = Times::of("replace a policy");
    for _ in 0..ROUNDS {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let netns = Netns::create_pinned(&sandbox)?;
        let started = Instant::now();
        let lease = network.lease(SandboxId::random(), &NetworkPolicy::default()).await?;
        leases.note(started);
        let attaching = Instant::now();
        network.attach(&lease, netns.clone()).await?;
        attaches.note(attaching);
        lease_attach.note(started);
        let listener = netns.run(|| std::net::TcpListener::bind("127.0.0.1:8000"))?;
        for _ in 0..20 {
            let started = Instant::now();
            drop(network.dial(&netns, 8000).await?);
            dials.note(started);
            listener.accept()?;
        }
        let started = Instant::now();
        network.set_policy(lease.slot, &denied).await?;
        policies.note(started);
        network.release(lease.slot).await?;
        stillbox::sys::netns::unpin(&sandbox)?;
    }
    network.close().await;

    let unpooled = NetworkConfig { pool_slots: 0, ..NetworkConfig::default() };
    let network = Network::open(unpooled, InstanceId::random(), &folder.join("unpooled")).await?;
    let mut makes = Times::of("lease of a slot made for it");
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let lease = network.lease(SandboxId::random(), &NetworkPolicy::default()).await?;
        makes.note(started);
        network.release(lease.slot).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let started = Instant::now();
    network.close().await;
    for times in [&mut lease_attach, &mut leases, &mut attaches, &mut dials, &mut policies, &mut makes] {
        times.tell();
    }
    println!("close of an empty network          {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
