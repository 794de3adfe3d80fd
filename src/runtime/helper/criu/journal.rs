//! What our CRIU notes while it is at work inside tasks (criu/0006): how to undo that from outside, should it be killed.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// In the work folder of a dump.
const FILE: &str = "cure.journal";

/// The kinds of records.
const THREAD: u32 = 1;
const CODE: u32 = 2;
const DONE: u32 = 3;

/// A new journal, for CRIU to inherit.
pub(super) fn begin(work: &Path) -> io::Result<File> {
    end(work)?;
    OpenOptions::new().append(true).create(true).mode(0o600).open(work.join(FILE))
}

/// Whether a dump has neither come to its end nor been undone.
pub(super) fn is_open(work: &Path) -> bool {
    work.join(FILE).exists()
}

/// Nothing is left to undo.
pub(super) fn end(work: &Path) -> io::Result<()> {
    match std::fs::remove_file(work.join(FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A process that CRIU was at work in when it ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Infected {
    /// As the host sees it.
    pub(super) pid: i32,
    /// Its threads that had to run foreign code, the first one among them.
    pub(super) threads: HashMap<i32, SavedThread>,
    /// What was written over, where; the lowest is where system calls were made from.
    pub(super) code: Vec<(u64, Vec<u8>)>,
}

/// A thread as it was.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SavedThread {
    /// The signals that it blocked.
    pub(super) blocked_signals: u64,
    /// Its general registers.
    pub(super) registers: Vec<u8>,
    /// What XSAVE saves; empty where the foreign code did not touch that.
    pub(super) extended_registers: Vec<u8>,
}

/// The processes that the journal leaves unfinished.
pub(super) fn read(work: &Path) -> io::Result<Vec<Infected>> {
    match std::fs::read(work.join(FILE)) {
        Ok(bytes) => Ok(unfinished(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A last record that was cut is none: what it announces was not done.
fn unfinished(bytes: &[u8]) -> Vec<Infected> {
    let mut found: Vec<Infected> = Vec::new();
    let mut rest = Reader(bytes);
    while let Some((kind, pid, tid, mut body)) = rest.record() {
        if kind == DONE {
            found.retain(|infected| infected.pid != pid);
            continue;
        }
        let place = found.iter().position(|infected| infected.pid == pid).unwrap_or_else(|| {
            found.push(Infected { pid, ..Infected::default() });
            found.len() - 1
        });
        match kind {
            THREAD => found[place].threads.extend(body.thread().map(|thread| (tid, thread))),
            CODE => found[place].code.extend(body.u64().map(|address| (address, body.0.to_vec()))),
            _ => {}
        }
    }
    found
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_ne_bytes)
    }

    fn i32(&mut self) -> Option<i32> {
        self.take(4)?.try_into().ok().map(i32::from_ne_bytes)
    }

    fn length(&mut self) -> Option<usize> {
        usize::try_from(self.u32()?).ok()
    }

    fn record(&mut self) -> Option<(u32, i32, i32, Self)> {
        let (kind, pid, tid, length) = (self.u32()?, self.i32()?, self.i32()?, self.length()?);
        Some((kind, pid, tid, Reader(self.take(length)?)))
    }

    fn thread(&mut self) -> Option<SavedThread> {
        let (blocked_signals, general, extended) = (self.u64()?, self.length()?, self.length()?);
        Some(SavedThread { blocked_signals, registers: self.take(general)?.to_vec(), extended_registers: self.take(extended)?.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32, pid: i32, tid: i32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        [&kind.to_ne_bytes()[..], &pid.to_ne_bytes(), &tid.to_ne_bytes(), &length.to_ne_bytes(), body].concat()
    }

    fn thread(blocked: u64, general: &[u8]) -> Vec<u8> {
        let sizes = [u32::try_from(general.len()).unwrap(), 0].map(u32::to_ne_bytes).concat();
        [&blocked.to_ne_bytes()[..], &sizes, general].concat()
    }

    #[test]
    fn only_the_process_that_was_not_finished_is_told_of() {
        let code = [&0x4000_u64.to_ne_bytes()[..], b"original"].concat();
        let bytes = [
            record(THREAD, 7, 7, &thread(1, b"r7")),
            record(DONE, 7, 7, b""),
            record(THREAD, 8, 8, &thread(2, b"r8")),
            record(CODE, 8, 8, &code),
            record(THREAD, 8, 9, &thread(3, b"r9")),
        ]
        .concat();
        let found = unfinished(&bytes);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].pid, found[0].threads.len()), (8, 2));
        assert_eq!(found[0].threads[&9], SavedThread { blocked_signals: 3, registers: b"r9".to_vec(), extended_registers: Vec::new() });
        assert_eq!(found[0].code, [(0x4000, b"original".to_vec())]);
    }

    #[test]
    fn a_record_that_was_cut_is_none() {
        let whole = record(THREAD, 7, 7, &thread(1, b"r7"));
        assert!(unfinished(&whole[..whole.len() - 1]).is_empty());
    }
}
