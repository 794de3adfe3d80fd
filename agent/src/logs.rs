//! The sandbox's log: what its processes did and said, kept in memory until the host polls it.
//!
//! The agent has no stdout of its own. The ring is bounded in bytes; the oldest entries go first, and the gap shows in
//! the sequence numbers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName, header};
use serde::Deserialize;

use crate::auth;
use crate::error::HttpError;
use crate::state::Agent;
use crate::wire::{LogEntry, LogLevel};

/// All lines together.
const RING_BYTES_MAX: usize = 256 << 10;
/// One message; longer output is cut here.
const MESSAGE_BYTES_MAX: usize = 1 << 10;

#[derive(Debug, Default)]
pub(crate) struct Log {
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    /// By sequence number, each as the line that will be served.
    lines: VecDeque<(u64, Box<str>)>,
    bytes: usize,
    last_seq: u64,
}

impl Log {
    pub(crate) fn write<const N: usize>(&self, level: LogLevel, message: impl Into<String>, fields: [(&str, String); N]) {
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        self.ring().push(level, message.into(), fields);
    }

    /// Output of a process: cut before it is decoded, since there may be much of it.
    pub(crate) fn write_bytes<const N: usize>(&self, level: LogLevel, message: &[u8], fields: [(&str, String); N]) {
        let head = &message[..message.len().min(MESSAGE_BYTES_MAX + 1)];
        self.write(level, String::from_utf8_lossy(head).trim_end_matches('\n'), fields);
    }

    /// Forgets all entries; numbers go on from where they are.
    pub(crate) fn clear(&self) {
        let mut ring = self.ring();
        ring.lines.clear();
        ring.bytes = 0;
    }

    /// The entries after `cursor`, as JSON lines.
    fn lines_after(&self, cursor: u64) -> String {
        let ring = self.ring();
        ring.lines.iter().filter(|(seq, _)| *seq > cursor).map(|(_, line)| &**line).collect()
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn push(&mut self, level: LogLevel, mut message: String, fields: BTreeMap<String, String>) {
        if message.len() > MESSAGE_BYTES_MAX {
            let cut = (0..=MESSAGE_BYTES_MAX).rev().find(|at| message.is_char_boundary(*at));
            message.truncate(cut.unwrap_or(0));
            message.push('…');
        }
        self.last_seq += 1;
        let entry = LogEntry { seq: self.last_seq, timestamp: rfc3339(SystemTime::now()), level, message, fields };
        // Strings and numbers always serialize.
        let Ok(line) = serde_json::to_string(&entry) else { return };
        self.bytes += line.len() + 1;
        self.lines.push_back((entry.seq, (line + "\n").into_boxed_str()));
        while self.bytes > RING_BYTES_MAX {
            let Some((_, oldest)) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Page {
    #[serde(default)]
    cursor: u64,
}

/// GET [`crate::wire::LOGS_PATH`], for the host alone.
pub(crate) async fn get(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    Query(page): Query<Page>,
) -> Result<([(HeaderName, &'static str); 1], String), HttpError> {
    auth::check_control_secret(&agent.control_secret(), &headers)?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], agent.log.lines_after(page.cursor)))
}

/// `1970-01-01T00:00:00.000Z`; the civil-from-days algorithm for the proleptic Gregorian calendar.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since_epoch.as_secs();
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since_epoch.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc3339_in_utc() {
        let at = |seconds, millis: u32| rfc3339(UNIX_EPOCH + Duration::new(seconds, millis * 1_000_000));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_827_696, 7), "2000-02-29T12:34:56.007Z");
        assert_eq!(at(1_767_225_599, 999), "2025-12-31T23:59:59.999Z");
    }

    #[test]
    fn a_page_starts_after_its_cursor() {
        let log = Log::default();
        for message in ["one", "two", "three"] {
            log.write(LogLevel::Info, message, [("pid", "7".to_owned())]);
        }
        let page: Vec<LogEntry> = log.lines_after(1).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(page.iter().map(|entry| (entry.seq, entry.message.as_str())).collect::<Vec<_>>(), [(2, "two"), (3, "three")]);
        assert_eq!(page[0].fields["pid"], "7");
        assert_eq!(log.lines_after(3), "");
    }

    #[test]
    fn the_ring_forgets_the_oldest_and_stays_within_its_bound() {
        let log = Log::default();
        for _ in 0..1000 {
            log.write(LogLevel::Info, "é".repeat(MESSAGE_BYTES_MAX), []);
        }
        let ring = log.ring();
        assert!(ring.bytes <= RING_BYTES_MAX && ring.bytes > RING_BYTES_MAX / 2, "{}", ring.bytes);
        assert_eq!(ring.lines.back().unwrap().0, 1000);
        assert_eq!(ring.bytes, ring.lines.iter().map(|(_, line)| line.len()).sum::<usize>());
    }
}
