//! Why CRIU failed, read from its log.
//!
//! Its RPC answer carries the last error only, and that is mostly the harmless "rlimit: Can't setup RLIMIT_NOFILE"
//! or "Dumping FAILED."; the first real error in the log is the one that names the cause.

use std::io::Read;
use std::path::Path;

/// Errors told; what follows them is their echo from the callers.
const ERRORS_MAX: usize = 3;

/// A sandbox can make CRIU log without end; the cause stands in the first part.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Lines that say nothing about the cause.
const ECHOES: [&str; 4] = ["Can't setup RLIMIT_NOFILE", "Dumping FAILED", "Restoring FAILED", "Killing processes because of failure"];

/// The first real errors of the log at `path`, or what there is to say without any.
pub(super) fn reason_in_log(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LOG_BYTES_MAX).read_to_end(&mut bytes));
    match read {
        Ok(_) => reason_in_text(&String::from_utf8_lossy(&bytes)),
        Err(error) => format!("it ended without a log ({error})"),
    }
}

fn reason_in_text(log: &str) -> String {
    let mut reasons: Vec<String> = Vec::new();
    for line in log.lines() {
        let Some(message) = error_message(line) else { continue };
        if ECHOES.iter().any(|echo| message.contains(echo)) || reasons.iter().any(|known| known == &message) {
            continue;
        }
        reasons.push(message);
        if reasons.len() == ERRORS_MAX {
            break;
        }
    }
    match reasons.is_empty() {
        true => "it ended without naming a reason".to_owned(),
        false => reasons.join("; "),
    }
}

/// The file that a restore could not open, and why, if that is what `reason` tells: where it is inside.
pub(super) fn unopened_file(reason: &str) -> Option<(String, String)> {
    let (_, told) = reason.split_once("Can't open file ")?;
    let (path, rest) = told.split_once(" on restore: ")?;
    let why = rest.split_once("; ").map_or(rest, |(why, _)| why);
    Some((format!("/{path}"), why.to_owned()))
}

/// `(00.1) 7: Error (criu/files.c:1): text` → `text`, with control characters replaced: names in it are the
/// sandbox's.
fn error_message(line: &str) -> Option<String> {
    let (_, after) = line.split_once("Error (")?;
    let (_, message) = after.split_once("): ")?;
    Some(message.trim().chars().map(|c| if c.is_control() { '?' } else { c }).take(400).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_first_real_error_and_never_the_rlimit_line() {
        let log = "Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
            Warn  (criu/kerndat.c:1642): CRIU was built without libnftables support\n\
            (00.004) 12: Error (criu/files.c:400): Unknown shit 600 (anon_inode:[io_uring])\n\
            (00.005) Error (criu/cr-dump.c:1975): Dumping FAILED.\n";
        assert_eq!(reason_in_text(log), "Unknown shit 600 (anon_inode:[io_uring])");
    }

    #[test]
    fn echoes_of_one_error_are_told_once_and_at_most_three_are_told() {
        let log = "Error (a.c:1): one\nError (a.c:1): one\nError (b.c:2): two\nError (c.c:3): three\nError (d.c:4): four\n";
        assert_eq!(reason_in_text(log), "one; two; three");
    }

    #[test]
    fn a_log_without_errors_says_so() {
        assert_eq!(reason_in_text("Warn (x.c:1): hm\n"), "it ended without naming a reason");
        assert!(reason_in_log(Path::new("/nonexistent/dump.log")).starts_with("it ended without a log"));
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_told_with_the_kernels_reason() {
        let log = "(00.027)      7: Error (criu/files-reg.c:2223): Can't open file mnt/data/a b on restore: No such file or directory\n\
            (00.027)      7: Error (criu/files-reg.c:2314): Can't open file mnt/data/a b: No such file or directory\n\
            (00.027)      7: Error (criu/files.c:1221): Unable to open fd=3 id=0x22\n";
        let found = unopened_file(&reason_in_text(log));
        assert_eq!(found, Some(("/mnt/data/a b".to_owned(), "No such file or directory".to_owned())));
        assert_eq!(unopened_file("Can't lookup mount=45 for fd=2"), None);
    }

    #[test]
    fn escape_sequences_of_a_sandbox_do_not_reach_the_reader() {
        assert_eq!(reason_in_text("Error (a.c:1): file \u{1b}[2Jx\n"), "file ?[2Jx");
    }
}
