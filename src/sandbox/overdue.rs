//! A sandbox whose time is up: killed, or paused. A pause can fail (a process that cannot be dumped, a full disk), and
//! then the sandbox runs on without an end; what is done about that is here.
//!
//! ```text
//! time is up ──pause──> fails: again after 30 s, 1, 2, 4 min ──fails──> paused with its files only ──fails──> killed
//! ```
//! It cannot be had for longer than was asked for, and the pause is what its user asked for at the end: files are
//! kept where memory cannot be. An end that is moved begins anew.

use super::driver::Driver;
use super::pause::PauseFailure;
use super::queue::{Answer, Verb};
use crate::model::{Keep, LogLevel, OnTimeout, SandboxState};
use std::time::Duration;
use time::OffsetDateTime;

/// Wait after the first failure; each further one doubles it.
const RETRY_FIRST: Duration = Duration::from_secs(30);
/// Pauses that are tried as the lifecycle says.
const TRIES: u32 = 5;
/// Of these, the rest keep files only.
const TRIES_IN_ALL: u32 = 7;

/// How often a sandbox could not be paused since its time was up.
#[derive(Debug, Default)]
pub(super) struct Overdue {
    failures: u32,
    /// Not before this; whatever else asks the timers meanwhile.
    retry_at: Option<OffsetDateTime>,
    /// The last reason that was told.
    told: Option<String>,
}

/// What is tried next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Pause(Keep),
    Kill,
}

impl Overdue {
    fn next(&self, wanted: Keep) -> Next {
        match self.failures {
            0..TRIES => Next::Pause(wanted),
            TRIES..TRIES_IN_ALL => Next::Pause(Keep::FilesOnly),
            TRIES_IN_ALL.. => Next::Kill,
        }
    }

    /// One more failure; how long to wait now. Another thing is tried at once.
    fn failed(&mut self) -> Duration {
        self.failures += 1;
        match self.failures {
            failures @ 0..TRIES => RETRY_FIRST * 2u32.pow(failures.saturating_sub(1)),
            TRIES | TRIES_IN_ALL.. => Duration::ZERO,
            _ => RETRY_FIRST,
        }
    }

    /// Whether this reason was not told before.
    fn is_news(&mut self, reason: &str) -> bool {
        let is_news = self.told.as_deref() != Some(reason);
        self.told = Some(reason.to_owned());
        is_news
    }
}

impl Driver {
    /// Its time may be up.
    pub(super) async fn expire(&mut self) {
        let now = self.core.clock.now();
        if self.record.state != SandboxState::Running || self.is_killing() {
            return;
        }
        let Some(reason) = self.reason_to_end(now) else { return self.watch_end() };
        if let Some(at) = self.overdue.retry_at.filter(|at| *at > now) {
            return self.core.timers.set(self.id, at);
        }
        let next = match self.record.spec.lifecycle.on_timeout {
            OnTimeout::Kill => Next::Kill,
            OnTimeout::Pause(keep) => self.overdue.next(keep),
        };
        match next {
            Next::Kill => self.accept_kill(reason, None).await,
            Next::Pause(keep) => match self.queue.ask(Verb::Pause(keep)) {
                Answer::Wait(_) | Answer::Already => {}
                Answer::Denied(_) => self.core.timers.set(self.id, now + RETRY_FIRST),
            },
        }
    }

    /// A pause failed. Says why, once per reason, and sees to it that a sandbox whose time is up does not run for ever.
    pub(super) fn pause_failed(&mut self, failure: &PauseFailure) {
        if self.record.state != SandboxState::Running || self.is_killing() {
            return;
        }
        let reason = super::error::chain(&failure.error(self.id));
        let now = self.core.clock.now();
        let mut is_turn = false;
        let mut what_next = "it keeps running".to_owned();
        if self.reason_to_end(now).is_some() {
            let (before, wait) = (self.overdue.failures, self.overdue.failed());
            self.overdue.retry_at = Some(now + wait);
            self.core.timers.set(self.id, now + wait);
            is_turn = before == 0 || wait.is_zero();
            what_next = match self.overdue.failures {
                TRIES => "its time is up, so only its files are kept".to_owned(),
                TRIES_IN_ALL.. => "its time is up, so it is removed".to_owned(),
                _ => format!("its time is up, so it is tried again in {} s, and then more rarely", wait.as_secs()),
            };
        }
        if self.overdue.is_news(&reason) || is_turn {
            tracing::warn!(sandbox.id = %self.id, "Could not pause sandbox {}: {reason}; {what_next}", self.id);
            self.log_line(LogLevel::Warn, format!("sandbox could not be paused: {reason}; {what_next}"));
        }
    }

    /// It was paused, or its end was moved.
    pub(super) fn not_overdue(&mut self) {
        self.overdue = Overdue::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_that_fails_is_tried_ever_more_rarely_then_without_memory_then_no_more() {
        let mut overdue = Overdue::default();
        let mut tried = Vec::new();
        while overdue.next(Keep::Memory) != Next::Kill {
            tried.push((overdue.next(Keep::Memory), overdue.failed().as_secs()));
        }
        let (memory, files) = (Next::Pause(Keep::Memory), Next::Pause(Keep::FilesOnly));
        assert_eq!(tried, [(memory, 30), (memory, 60), (memory, 120), (memory, 240), (memory, 0), (files, 30), (files, 0)]);
    }

    #[test]
    fn a_reason_is_news_until_another_one_comes() {
        let mut overdue = Overdue::default();
        assert_eq!(["a", "a", "b", "a"].map(|reason| overdue.is_news(reason)), [true, false, true, true]);
    }
}
