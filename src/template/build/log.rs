//! A build's log: what its owner reads while it goes on, and afterwards.

use crate::model::{BuildId, LogEntry, LogLevel};
use crate::sandbox::Printed;
use crate::store::Store;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use time::OffsetDateTime;

/// Lines of one build; readers count lines, so none may be dropped from the front (history.rs keeps 10000).
const LINES_MAX: u32 = 9_000;
/// Characters of one line.
const LINE_MAX: usize = 4_096;
/// The field that says which part of the build a line is of.
pub(super) const STEP: &str = "step";

/// One build's log. Clones write to the same one.
#[derive(Debug, Clone)]
pub(super) struct BuildLog {
    store: Store,
    scope: String,
    lines: Arc<AtomicU32>,
}

impl BuildLog {
    pub(super) fn of(store: &Store, build: BuildId) -> Self {
        Self { store: store.clone(), scope: build.to_string(), lines: Arc::default() }
    }

    /// A line about the build as a whole.
    pub(super) fn say(&self, level: LogLevel, message: impl Into<String>) {
        self.write(level, message.into(), None);
    }

    /// A line about one part of it: `base`, a step's number, `finalize`.
    pub(super) fn say_of(&self, step: &str, level: LogLevel, message: impl Into<String>) {
        self.write(level, message.into(), Some(step));
    }

    fn write(&self, level: LogLevel, message: String, step: Option<&str>) {
        let message = match (self.lines.fetch_add(1, Ordering::Relaxed), level) {
            (..LINES_MAX, _) => message,
            // How it ended is always worth a line.
            (_, LogLevel::Error) => message,
            (LINES_MAX, _) => format!("this log ends here: {LINES_MAX} lines are kept of a build"),
            _ => return,
        };
        let fields: BTreeMap<String, String> = step.map(|step| (STEP.to_owned(), step.to_owned())).into_iter().collect();
        let entry = LogEntry { at: OffsetDateTime::now_utc(), level, message: message.chars().take(LINE_MAX).collect(), fields };
        self.store.keep_logs(self.scope.clone(), vec![entry], None);
    }
}

/// Turns pieces of output into lines of a log.
#[derive(Debug)]
pub(super) struct Output {
    log: BuildLog,
    step: String,
    /// Before each line: `builder 1/3`.
    prefix: String,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Output {
    pub(super) fn of(log: &BuildLog, step: &str, prefix: &str) -> Self {
        Self { log: log.clone(), step: step.to_owned(), prefix: prefix.to_owned(), stdout: Vec::new(), stderr: Vec::new() }
    }

    /// Whole lines go out, the rest waits.
    pub(super) fn add(&mut self, piece: Printed<'_>) {
        let (bytes, buffer) = match piece {
            Printed::Stdout(bytes) => (bytes, &mut self.stdout),
            Printed::Stderr(bytes) => (bytes, &mut self.stderr),
        };
        buffer.extend_from_slice(bytes);
        let end = match buffer.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            // Without an end in sight it is cut.
            None if buffer.len() > LINE_MAX * 4 => buffer.len(),
            None => return,
        };
        let lines: Vec<u8> = buffer.drain(..end).collect();
        self.tell(&lines, piece);
    }

    fn tell(&self, lines: &[u8], stream: Printed<'_>) {
        let (level, stream) = match stream {
            Printed::Stdout(_) => (LogLevel::Info, "stdout"),
            Printed::Stderr(_) => (LogLevel::Warn, "stderr"),
        };
        for line in String::from_utf8_lossy(lines).lines() {
            // A progress bar redraws its line: what stands there at the end counts.
            let line = line.trim_end_matches('\r').rsplit('\r').next().unwrap_or_default().trim();
            if !line.is_empty() {
                self.log.say_of(&self.step, level, format!("[{}] [{stream}]: {line}", self.prefix));
            }
        }
    }
}

/// When there is no more, what is left is a line as well.
impl Drop for Output {
    fn drop(&mut self) {
        let (stdout, stderr) = (std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr));
        self.tell(&stdout, Printed::Stdout(&[]));
        self.tell(&stderr, Printed::Stderr(&[]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn logged(write: impl FnOnce(&BuildLog)) -> Vec<(LogLevel, String)> {
        let folder = tempfile::tempdir().unwrap();
        let (store, build) = (Store::open(folder.path()).unwrap(), BuildId::random());
        write(&BuildLog::of(&store, build));
        let page = store.log_page(build.to_string(), LogLevel::Debug, 0, 20_000).await.unwrap();
        page.into_iter().map(|entry| (entry.level, entry.message)).collect()
    }

    #[tokio::test]
    async fn lines_are_told_whole_however_they_were_cut() {
        let lines = logged(|log| {
            let mut output = Output::of(log, "1", "builder 1/1");
            for piece in ["on", "e\ntw"] {
                output.add(Printed::Stdout(piece.as_bytes()));
            }
            output.add(Printed::Stderr(b"10%\r50%\r100%\r\n"));
            output.add(Printed::Stdout(b"o"));
        });
        let expected = [
            (LogLevel::Info, "[builder 1/1] [stdout]: one".to_owned()),
            (LogLevel::Warn, "[builder 1/1] [stderr]: 100%".to_owned()),
            (LogLevel::Info, "[builder 1/1] [stdout]: two".to_owned()),
        ];
        assert_eq!(lines.await, expected);
    }

    #[tokio::test]
    async fn a_log_without_end_is_cut_and_still_says_how_it_ended() {
        let lines = logged(|log| {
            for number in 0..LINES_MAX + 10 {
                log.say(LogLevel::Info, number.to_string());
            }
            log.say(LogLevel::Error, "failed");
        });
        let lines = lines.await;
        assert_eq!(lines.len(), usize::try_from(LINES_MAX).unwrap() + 2);
        assert!(lines[lines.len() - 2].1.starts_with("this log ends here"));
        assert_eq!(lines[lines.len() - 1].1, "failed");
    }
}
