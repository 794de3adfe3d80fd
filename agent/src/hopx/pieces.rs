//! What running code puts out, piece by piece, and all of it together.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::interpreter::Shown;
use crate::process::exit::Exit;

/// What is kept of either stream; the rest is counted and dropped.
const OUTPUT_BYTES_MAX: usize = 8 << 20;
/// Pieces that a slow client may be behind; then whatever runs waits, as with a pipe.
const PIECES_MAX: usize = 64;
/// What shells say of a command that was ended by its timeout, and by a signal.
const EXIT_TIMED_OUT: i32 = 124;
const EXIT_SIGNAL_BASE: i32 = 128;

#[derive(Debug)]
pub(super) enum Piece {
    Stdout(String),
    Stderr(String),
    /// A value or a picture, in as many forms as it has.
    Shown(Shown),
    /// The last one.
    Ended(Ended),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Exited(Exit),
    TimedOut(Duration),
}

impl Outcome {
    pub(super) fn exit_code(self) -> i32 {
        match self {
            Outcome::Exited(Exit::Code(code)) => code,
            Outcome::Exited(Exit::Signal { number, .. }) => EXIT_SIGNAL_BASE + number,
            Outcome::TimedOut(_) => EXIT_TIMED_OUT,
        }
    }

    pub(super) fn is_success(self) -> bool {
        self.exit_code() == 0
    }
}

pub(super) fn channel() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(PIECES_MAX)
}

/// Everything that was put out.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) shown: Vec<Shown>,
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
}

/// Takes all pieces until the end; None when whatever made them is gone without one.
pub(super) async fn gather(mut pieces: mpsc::Receiver<Piece>) -> Option<Finished> {
    let (mut stdout, mut stderr, mut shown) = (Stream::default(), Stream::default(), Vec::new());
    loop {
        match pieces.recv().await? {
            Piece::Stdout(text) => stdout.take(&text),
            Piece::Stderr(text) => stderr.take(&text),
            Piece::Shown(one) => shown.push(one),
            Piece::Ended(Ended { outcome, took }) => {
                return Some(Finished { stdout: stdout.text(), stderr: stderr.text(), shown, outcome, took });
            }
        }
    }
}

/// One stream, as far as it is kept.
#[derive(Debug, Default)]
struct Stream {
    kept: String,
    dropped: usize,
}

impl Stream {
    fn take(&mut self, text: &str) {
        let room = OUTPUT_BYTES_MAX - self.kept.len();
        let cut = (0..=room.min(text.len())).rev().find(|cut| text.is_char_boundary(*cut)).unwrap_or(0);
        self.kept.push_str(&text[..cut]);
        self.dropped += text.len() - cut;
    }

    fn text(self) -> String {
        match self.dropped {
            0 => self.kept,
            dropped => format!("{}\n[{dropped} more bytes were printed; the limit is {OUTPUT_BYTES_MAX}]\n", self.kept),
        }
    }
}

/// Makes text of bytes that come in chunks, which may end in the middle of a character.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    begun: Vec<u8>,
}

/// The longest character has four bytes.
const CHARACTER_BYTES_MAX: usize = 4;

impl Decoder {
    /// What is no UTF-8 becomes replacement characters.
    pub(super) fn text_of(&mut self, bytes: &[u8]) -> String {
        self.begun.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.begun) {
            Ok(_) => self.begun.len(),
            // No length: the bytes after it may be the beginning of a character.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => self.begun.len() - unfinished(&self.begun),
        };
        let rest = self.begun.split_off(whole);
        String::from_utf8_lossy(&std::mem::replace(&mut self.begun, rest)).into_owned()
    }

    /// What is left when nothing follows.
    pub(super) fn rest(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.begun)).into_owned()
    }
}

/// How many bytes at the end may be the beginning of a character.
fn unfinished(bytes: &[u8]) -> usize {
    let tails = (1..CHARACTER_BYTES_MAX).filter(|length| *length <= bytes.len());
    let is_begun = |length: &usize| {
        let tail = &bytes[bytes.len() - length..];
        std::str::from_utf8(tail).is_err_and(|error| error.error_len().is_none() && error.valid_up_to() == 0)
    };
    tails.into_iter().rev().find(is_begun).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_keeps_its_beginning_and_says_what_is_missing() {
        let mut stream = Stream::default();
        stream.take(&"a".repeat(OUTPUT_BYTES_MAX - 1));
        stream.take("bcd");
        let text = stream.text();
        assert!(text.starts_with("aaa") && text[OUTPUT_BYTES_MAX - 1..].starts_with("b\n[2 more bytes"));
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(Outcome::Exited(Exit::Code(3)).exit_code(), 3);
        assert_eq!(Outcome::Exited(Exit::Signal { number: 9, core_dumped: false }).exit_code(), 137);
        assert_eq!(Outcome::TimedOut(Duration::from_secs(1)).exit_code(), 124);
    }

    #[test]
    fn characters_that_come_in_two_chunks_stay_whole() {
        let text = "aü€😀z";
        for cut in 0..=text.len() {
            let mut decoder = Decoder::default();
            let (first, second) = text.as_bytes().split_at(cut);
            assert_eq!(decoder.text_of(first) + &decoder.text_of(second) + &decoder.rest(), text, "{cut}");
        }
        let mut decoder = Decoder::default();
        assert_eq!(decoder.text_of(b"\xff\xe2\x82"), "\u{fffd}");
        assert_eq!(decoder.text_of(b"\xac"), "€");
        assert_eq!(decoder.text_of(b"\xe2"), "");
        assert_eq!(decoder.rest(), "\u{fffd}");
    }
}
