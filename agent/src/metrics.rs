//! GET /metrics: the sandbox's use of CPU, memory and disk, as far as it can be seen from inside.
//!
//! cgroup files are not mounted in a sandbox and /proc/meminfo is the machine's, so use is summed over the processes
//! and limits are what /init said.

use std::fs;
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use tokio::time::Instant;

use crate::blocking::{self, Lost};
use crate::error::HttpError;
use crate::state::{Agent, Identity};
use crate::wire::Metrics;

const MIB: u64 = 1 << 20;

/// Remembers the last reading, since a share of CPU is a difference.
#[derive(Debug)]
pub(crate) struct CpuMeter {
    last: Mutex<Reading>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    ticks: u64,
}

impl CpuMeter {
    pub(crate) fn new() -> CpuMeter {
        CpuMeter { last: Mutex::new(Reading { at: Instant::now(), ticks: 0 }) }
    }

    /// Per cent of `cpus` CPUs since the last call, or since the start.
    fn used_pct(&self, ticks: u64, cpus: u32) -> f64 {
        let now = Reading { at: Instant::now(), ticks };
        let last = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), now);
        let seconds = now.at.duration_since(last.at).as_secs_f64().max(0.001);
        let busy = now.ticks.saturating_sub(last.ticks) as f64 / rustix::param::clock_ticks_per_second() as f64;
        let pct = (busy / seconds / f64::from(cpus.max(1)) * 100.0).min(100.0);
        (pct * 100.0).round() / 100.0
    }
}

pub(crate) async fn get(State(agent): State<Arc<Agent>>) -> Result<Json<Metrics>, HttpError> {
    Ok(Json(measure_now(&agent).await?))
}

/// As of now; the share of CPU is that since the last call.
pub(crate) async fn measure_now(agent: &Arc<Agent>) -> Result<Metrics, Lost> {
    let (agent, identity) = (Arc::clone(agent), agent.identity());
    // Reading /proc takes longer the more processes there are.
    blocking::run(move || measure(&agent.cpu_meter, &identity)).await
}

fn measure(meter: &CpuMeter, identity: &Identity) -> Metrics {
    let cpu_count = identity.cpu_count.unwrap_or_else(machine_cpus);
    let mem_total = identity.memory_bytes.unwrap_or_else(machine_memory);
    let (ticks, mem_used) = processes().map(|pid| (cpu_ticks(pid), memory(pid))).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let (disk_used, disk_total) = disk();
    Metrics {
        ts: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed()),
        cpu_count,
        cpu_used_pct: meter.used_pct(ticks, cpu_count),
        mem_total,
        mem_used,
        // Page cache is charged to the cgroup, which cannot be seen from here.
        mem_cache: 0,
        mem_total_mib: mem_total / MIB,
        mem_used_mib: mem_used / MIB,
        disk_used,
        disk_total,
    }
}

fn machine_cpus() -> u32 {
    available_parallelism().map_or(1, |cpus| u32::try_from(NonZero::get(cpus)).unwrap_or(u32::MAX))
}

fn machine_memory() -> u64 {
    kib_after("/proc/meminfo", "MemTotal:").unwrap_or(0)
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Own and reaped children's time, in user and kernel. Summed over all processes this never falls when one ends, since
/// its parent takes it over. A process that is gone meanwhile counts nothing.
fn cpu_ticks(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|stat| ticks_in(&stat)).unwrap_or(0)
}

/// Fields 14 to 17 of /proc/PID/stat; the name in field 2 may itself hold blanks and brackets.
fn ticks_in(stat: &str) -> Option<u64> {
    let after_name = stat.get(stat.rfind(')')? + 1..)?;
    let times: Vec<u64> = after_name.split_ascii_whitespace().skip(11).take(4).filter_map(|field| field.parse().ok()).collect();
    (times.len() == 4).then(|| times.iter().sum())
}

/// The proportional share, so that what processes share is counted once.
fn memory(pid: u32) -> u64 {
    kib_after(&format!("/proc/{pid}/smaps_rollup"), "Pss:").or_else(|| kib_after(&format!("/proc/{pid}/status"), "VmRSS:")).unwrap_or(0)
}

/// Bytes, from a line like `Pss:   12 kB`.
fn kib_after(path: &str, label: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let kib: u64 = text.lines().find_map(|line| line.strip_prefix(label))?.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Used and total bytes of the root's file system.
fn disk() -> (u64, u64) {
    rustix::fs::statvfs("/").map_or((0, 0), |stat| ((stat.f_blocks - stat.f_bfree) * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_process_name() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194560 100 200 0 0 1 2 3 4 20 0 1 0 300";
        assert_eq!(ticks_in(stat), Some(10));
        assert_eq!(ticks_in("7 (x) S 1"), None);
        assert_eq!(ticks_in(""), None);
    }

    #[test]
    fn this_process_is_measured() {
        let identity = Identity { cpu_count: Some(2), memory_bytes: Some(512 * MIB), ..Identity::generic(String::new()) };
        let metrics = measure(&CpuMeter::new(), &identity);
        assert_eq!((metrics.cpu_count, metrics.mem_total, metrics.mem_total_mib), (2, 512 * MIB, 512));
        assert!(metrics.mem_used > MIB && metrics.disk_total > metrics.disk_used && metrics.ts > 1_700_000_000);
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct));
    }
}
