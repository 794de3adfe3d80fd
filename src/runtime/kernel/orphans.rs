//! Children that nobody asked for: what helpers leave behind comes to the server, which is the subreaper.
//!
//! A lazy restore's wrapper outlives its helper, and a helper that was killed leaves what it and its CRIU had forked. Their
//! exit status interests nobody, but until it is taken they stay in the process table.

use crate::sys::process::{Zombie, has_zombie_child, open_pidfd, reap, zombie_children};
use nix::unistd::getpgrp;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

/// Between two looks at those that have ended.
const ROUND: Duration = Duration::from_secs(1);
/// Helpers, and whom they start, are in process groups of their own. For those that somebody waits for, they do it at once,
/// and can do without the status: what is there still at the second look is nobody's.
const LOOKS_AT_HELPERS: u32 = 2;
/// Programs that the server started itself are in its own group. Who waits for one needs its status, however busy the
/// machine is.
const LOOKS_AT_OURS: u32 = 20;

/// Goes on for as long as the tokio runtime does.
pub(super) async fn reap_forever() {
    let mut looks = HashMap::new();
    loop {
        tokio::time::sleep(ROUND).await;
        if !has_zombie_child() {
            looks.clear();
            continue;
        }
        looks = tokio::task::spawn_blocking(move || take_old(&looks)).await.unwrap_or_default();
    }
}

/// Takes those that were looked at often enough, and returns how often the others were.
fn take_old(earlier: &HashMap<i32, u32>) -> HashMap<i32, u32> {
    let own_group = getpgrp().as_raw();
    let mut looks = HashMap::new();
    for zombie in zombie_children() {
        let looked_at = earlier.get(&zombie.pid).unwrap_or(&0) + 1;
        match looked_at < looks_at(zombie, own_group) {
            true => drop(looks.insert(zombie.pid, looked_at)),
            false => take(zombie.pid),
        }
    }
    looks
}

fn looks_at(zombie: Zombie, own_group: i32) -> u32 {
    match zombie.group == own_group {
        true => LOOKS_AT_OURS,
        false => LOOKS_AT_HELPERS,
    }
}

fn take(pid: i32) {
    if let Ok(pidfd) = open_pidfd(pid) {
        // Whoever took it meanwhile had a better right to it.
        let _ = reap(pidfd.as_fd());
    }
}
