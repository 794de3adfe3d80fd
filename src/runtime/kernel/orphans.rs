//! Children that nobody asked for: what helpers leave behind comes to the server, which is the subreaper.
//!
//! A lazy restore's wrapper outlives its helper, and a helper that was killed leaves what it had forked. Their exit
//! status interests nobody, but until it is taken they stay in the process table.

use crate::sys::process::{open_pidfd, reap, zombie_children};
use std::collections::HashSet;
use std::os::fd::AsFd;
use std::time::Duration;

/// Children that somebody waits for are waited for at once. What is still a zombie one round later is nobody's.
const ROUND: Duration = Duration::from_secs(10);

/// Goes on for as long as the tokio runtime does.
pub(super) async fn reap_forever() {
    let mut seen = HashSet::new();
    loop {
        tokio::time::sleep(ROUND).await;
        let zombies = tokio::task::spawn_blocking(move || take_old(&seen)).await;
        seen = zombies.unwrap_or_default();
    }
}

/// Takes the zombies that were there last time, and returns those of now.
fn take_old(seen: &HashSet<i32>) -> HashSet<i32> {
    let zombies = zombie_children();
    for pid in zombies.iter().filter(|pid| seen.contains(pid)) {
        if let Ok(pidfd) = open_pidfd(*pid) {
            // Whoever took it meanwhile had a better right to it.
            let _ = reap(pidfd.as_fd());
        }
    }
    zombies
}
