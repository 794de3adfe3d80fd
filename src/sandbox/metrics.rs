//! Samples of what a sandbox uses: the first at its start, then regularly, the last before its end.

use super::driver::Driver;
use super::error::chain;
use crate::model::{ByteSize, MetricPoint, Resources};
use crate::runtime::Usage;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::time::Instant;

/// Remembers the sample before, which the share of CPU is counted from.
#[derive(Debug)]
pub(super) struct Sampler {
    due: Instant,
    last: Option<(u64, Instant)>,
}

impl Sampler {
    pub(super) fn new() -> Self {
        Self { due: Instant::now(), last: None }
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    fn point(&mut self, usage: &Usage, resources: &Resources, at: OffsetDateTime, now: Instant) -> MetricPoint {
        let before = self.last.replace((usage.cpu_ns, now));
        let cpu_used_pct = before.map_or(0.0, |(cpu_ns, then)| share(usage.cpu_ns.saturating_sub(cpu_ns), now - then, resources.cpu_count));
        MetricPoint {
            at,
            cpu_count: resources.cpu_count,
            cpu_used_pct,
            memory_used: ByteSize(usage.memory_used_bytes),
            memory_total: resources.memory,
            memory_cache: ByteSize(usage.memory_cache_bytes),
            disk_used: ByteSize(usage.disk_used_bytes),
            disk_total: ByteSize(usage.disk_total_bytes),
        }
    }
}

/// Share of all CPUs together, 0 to 100, two decimals.
fn share(cpu_ns: u64, elapsed: Duration, cpu_count: u32) -> f64 {
    let available = elapsed.as_secs_f64() * f64::from(cpu_count.max(1));
    if available <= 0.0 {
        return 0.0;
    }
    let share = Duration::from_nanos(cpu_ns).as_secs_f64() / available * 100.0;
    (share.clamp(0.0, 100.0) * 100.0).round() / 100.0
}

impl Driver {
    /// Takes a sample; a failure is logged and leaves a gap.
    pub(super) async fn sample(&mut self) {
        let Some(run) = &mut self.run else { return };
        run.sampler.due = Instant::now() + self.core.config.metrics_every;
        match self.core.runtime.usage(self.id).await {
            Ok(usage) => {
                let point = run.sampler.point(&usage, &self.record.spec.resources, self.core.clock.now(), Instant::now());
                self.core.store.keep_metric(self.id, point);
            }
            Err(error) => tracing::debug!(sandbox.id = %self.id, error = chain(&error), "No sample of sandbox {}", self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_share_is_of_all_cpus_together_with_two_decimals() {
        let second = Duration::from_secs(1);
        assert_eq!(share(1_000_000_000, second, 2), 50.0);
        assert_eq!(share(123_456_789, second, 1), 12.35);
        assert_eq!(share(5_000_000_000, second, 2), 100.0);
        assert_eq!(share(1, Duration::ZERO, 2), 0.0);
    }

    proptest! {
        #[test]
        fn a_share_is_always_between_0_and_100(cpu_ns: u64, millis in 0u64..100_000_000, cpus in 0u32..1024) {
            let share = share(cpu_ns, Duration::from_millis(millis), cpus);
            prop_assert!((0.0..=100.0).contains(&share));
        }
    }
}
