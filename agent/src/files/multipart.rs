//! Streaming reader of `multipart/form-data` (RFC 7578): one part after the other out of any blocking source.
//!
//! Own code, because the parsers at hand buffer whatever a ready source offers, up to the whole upload.

use std::io::{self, Read};

use memchr::memmem::Finder;

/// Bytes of one part's headers.
const HEADER_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 32;
const BUFFER_BYTES: usize = 64 << 10;
/// RFC 2046 allows 70.
const BOUNDARY_BYTES_MAX: usize = 200;

#[derive(Debug, thiserror::Error)]
pub(crate) enum MultipartError {
    #[error("error parsing multipart form: no multipart boundary param in Content-Type")]
    NoBoundary,
    #[error("error reading form: the body ends before its closing boundary")]
    Truncated,
    #[error("error reading form: {0}")]
    Malformed(&'static str),
    #[error("error reading form")]
    Io(#[from] io::Error),
}

/// What a part says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Disposition {
    pub(crate) name: Option<String>,
    /// In full: a client's slashes are part of the target's path.
    pub(crate) filename: Option<String>,
}

/// The body. After [`Multipart::next_part`] it reads as that part's content.
#[derive(Debug)]
pub(crate) struct Multipart<R> {
    source: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// CRLF, two dashes, the boundary: what ends every part.
    delimiter: Finder<'static>,
    at_delimiter: bool,
}

impl<R: Read> Multipart<R> {
    pub(crate) fn new(source: R, boundary: &str) -> Result<Self, MultipartError> {
        if boundary.is_empty() || boundary.len() > BOUNDARY_BYTES_MAX {
            return Err(MultipartError::NoBoundary);
        }
        let delimiter = Finder::new(format!("\r\n--{boundary}").as_bytes()).into_owned();
        // The first boundary has no line end before it, so it is given one.
        let mut buffer = vec![0; BUFFER_BYTES];
        buffer[..2].copy_from_slice(b"\r\n");
        Ok(Multipart { source, buffer, start: 0, end: 2, delimiter, at_delimiter: false })
    }

    /// Skips what is left of the current part and goes to the next one; `None` after the last.
    pub(crate) fn next_part(&mut self) -> Result<Option<Disposition>, MultipartError> {
        while let chunk @ 1.. = self.chunk()? {
            self.start += chunk;
        }
        self.start += self.delimiter.needle().len();
        self.at_delimiter = false;
        if self.starts_with(b"--")? {
            return Ok(None);
        }
        // The line end after the boundary stays: with it, headers end in an empty line even if there are none.
        while self.starts_with(b" ")? || self.starts_with(b"\t")? {
            self.start += 1;
        }
        if !self.starts_with(b"\r\n")? {
            return Err(MultipartError::Malformed("a boundary is followed by more than its line's end"));
        }
        self.headers().map(Some)
    }

    fn headers(&mut self) -> Result<Disposition, MultipartError> {
        let length = loop {
            match memchr::memmem::find(self.buffered(), b"\r\n\r\n") {
                Some(position) => break position + 4,
                None if self.buffered().len() > HEADER_BYTES_MAX => {
                    return Err(MultipartError::Malformed("the headers of a part exceed 16 KiB"));
                }
                None if !self.fill()? => return Err(MultipartError::Truncated),
                None => {}
            }
        };
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let parsed = httparse::parse_headers(&self.buffered()[2..length], &mut headers)
            .map_err(|_| MultipartError::Malformed("the headers of a part cannot be read"))?;
        let httparse::Status::Complete((_, parsed)) = parsed else {
            return Err(MultipartError::Malformed("the headers of a part are incomplete"));
        };
        let disposition = parsed
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("content-disposition"))
            .map(|header| Disposition::parse(&String::from_utf8_lossy(header.value)))
            .unwrap_or_default();
        self.start += length;
        Ok(disposition)
    }

    /// How many buffered bytes belong to the current part for certain; 0 at its end.
    fn chunk(&mut self) -> Result<usize, MultipartError> {
        while !self.at_delimiter {
            if let Some(position) = self.delimiter.find(self.buffered()) {
                self.at_delimiter = position == 0;
                return Ok(position);
            }
            // The last bytes may be the beginning of a delimiter.
            let certain = (self.end - self.start).saturating_sub(self.delimiter.needle().len() - 1);
            if certain > 0 {
                return Ok(certain);
            }
            if !self.fill()? {
                return Err(MultipartError::Truncated);
            }
        }
        Ok(0)
    }

    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn starts_with(&mut self, prefix: &[u8]) -> Result<bool, MultipartError> {
        while self.buffered().len() < prefix.len() {
            if !self.fill()? {
                return Err(MultipartError::Truncated);
            }
        }
        Ok(self.buffered().starts_with(prefix))
    }

    /// Reads more of the source; false at its end.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let read = self.source.read(&mut self.buffer[self.end..])?;
        self.end += read;
        Ok(read > 0)
    }
}

impl<R: Read> Read for Multipart<R> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let chunk = self.chunk().map_err(|error| match error {
            MultipartError::Io(error) => error,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        })?;
        let length = chunk.min(target.len());
        target[..length].copy_from_slice(&self.buffered()[..length]);
        self.start += length;
        Ok(length)
    }
}

impl Disposition {
    fn parse(header: &str) -> Disposition {
        let mut disposition = Disposition::default();
        for (key, value) in parameters(header) {
            match key.as_str() {
                "name" => disposition.name = Some(value),
                "filename" => {
                    disposition.filename.get_or_insert(value);
                }
                // RFC 2231 spells what a quoted string cannot, and wins.
                "filename*" => disposition.filename = Some(extended(&value).unwrap_or(value)),
                _ => {}
            }
        }
        disposition
    }
}

/// The `boundary` of a Content-Type.
pub(crate) fn boundary(content_type: &str) -> Option<String> {
    parameters(content_type).find_map(|(key, value)| (key == "boundary").then_some(value))
}

/// The `; key=value` pairs after a header's first word, with values unquoted.
fn parameters(header: &str) -> impl Iterator<Item = (String, String)> {
    let mut rest = header.split_once(';').map_or("", |(_, rest)| rest);
    std::iter::from_fn(move || {
        let (key, after) = rest.split_once('=')?;
        let key = key.trim_matches([' ', '\t', ';']).to_ascii_lowercase();
        let (value, after) = match after.trim_start().strip_prefix('"') {
            Some(quoted) => unquoted(quoted),
            None => {
                let (value, after) = after.split_once(';').unwrap_or((after, ""));
                (value.trim().to_owned(), after)
            }
        };
        rest = after;
        Some((key, value))
    })
}

/// Up to the closing quote. A backslash escapes quotes and itself only: some clients send bare ones in paths.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices().peekable();
    while let Some((position, character)) = characters.next() {
        match (character, characters.peek()) {
            ('"', _) => return (value, &text[position + 1..]),
            ('\\', Some(&(_, escaped @ ('"' | '\\')))) => {
                characters.next();
                value.push(escaped);
            }
            (other, _) => value.push(other),
        }
    }
    (value, "")
}

/// `utf-8''caf%C3%A9`
fn extended(value: &str) -> Option<String> {
    let (charset, rest) = value.split_once('\'')?;
    let (_language, encoded) = rest.split_once('\'')?;
    if !charset.eq_ignore_ascii_case("utf-8") {
        return None;
    }
    let mut decoded = Vec::new();
    let mut bytes = encoded.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            decoded.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives out a few bytes at a time, so that every boundary is split somewhere.
    struct Trickle<'a> {
        rest: &'a [u8],
        step: usize,
    }

    impl Read for Trickle<'_> {
        fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
            let length = self.step.min(self.rest.len()).min(target.len());
            target[..length].copy_from_slice(&self.rest[..length]);
            self.rest = &self.rest[length..];
            Ok(length)
        }
    }

    type Parts = Vec<(Option<String>, Vec<u8>)>;

    fn parts_in_steps(body: &[u8], step: usize) -> Result<Parts, MultipartError> {
        let mut multipart = Multipart::new(Trickle { rest: body, step }, "B")?;
        let mut parts = Vec::new();
        while let Some(disposition) = multipart.next_part()? {
            let mut content = Vec::new();
            multipart.read_to_end(&mut content)?;
            parts.push((disposition.filename, content));
        }
        Ok(parts)
    }

    fn part(filename: &str, content: &str) -> String {
        format!("--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{filename}\"\r\n\r\n{content}\r\n")
    }

    #[test]
    fn parts_come_out_as_they_went_in_however_the_body_is_cut() {
        let contents = ["", "x", "\r\n", "\r\n--", "--B", "\r\n--C\r\n\r\n", "a\r\n\r\nb\n--B\n"];
        let body: String = contents.iter().map(|content| part("f", content)).collect::<String>() + "--B--\r\n";
        for step in 1..40 {
            let parts = parts_in_steps(body.as_bytes(), step).unwrap();
            let read: Vec<&[u8]> = parts.iter().map(|(_, content)| content.as_slice()).collect();
            assert_eq!(read, contents.map(str::as_bytes), "{step} bytes at a time");
        }
    }

    #[test]
    fn a_part_larger_than_the_buffer_streams_through() {
        let content = "0123456789\r\n".repeat(BUFFER_BYTES / 4);
        let body = part("f", &content) + "--B--";
        let parts = parts_in_steps(body.as_bytes(), 7777).unwrap();
        assert_eq!(parts[0].1, content.as_bytes());
    }

    #[test]
    fn unread_parts_preambles_and_padding_are_skipped() {
        let body = format!("preamble\r\n--B \t\r\n\r\nno headers\r\n{}--B--epilogue", part("g", "2"));
        let mut multipart = Multipart::new(body.as_bytes(), "B").unwrap();
        assert_eq!(multipart.next_part().unwrap(), Some(Disposition::default()));
        let second = multipart.next_part().unwrap().unwrap();
        assert_eq!((second.name.as_deref(), second.filename.as_deref()), (Some("file"), Some("g")));
        assert_eq!(multipart.next_part().unwrap(), None);
    }

    #[test]
    fn a_body_that_ends_early_is_an_error() {
        let whole = part("f", "content") + "--B--";
        for length in 0..whole.len() {
            let result = parts_in_steps(&whole.as_bytes()[..length], 5);
            assert!(result.is_err(), "{length} of {} bytes", whole.len());
        }
    }

    #[test]
    fn endless_headers_are_refused() {
        let body = format!("--B\r\nX: {}", "x".repeat(HEADER_BYTES_MAX * 2));
        let error = parts_in_steps(body.as_bytes(), 1000).unwrap_err();
        assert!(matches!(error, MultipartError::Malformed(_)), "{error}");
    }

    #[test]
    fn file_names_keep_slashes_quotes_and_letters() {
        let filename = |header: &str| Disposition::parse(header).filename;
        let named = |name: &str| Some(name.to_owned());
        assert_eq!(filename("form-data; name=\"file\"; filename=\"/a/b c.txt\""), named("/a/b c.txt"));
        assert_eq!(filename("form-data; filename=plain.txt ; name=file"), named("plain.txt"));
        assert_eq!(filename(r#"form-data; filename="a\"b\\c\d;e""#), named(r#"a"b\c\d;e"#));
        assert_eq!(filename("form-data; filename=\"é.txt\""), named("é.txt"));
        assert_eq!(filename("form-data; filename*=utf-8''caf%C3%A9; filename=\"cafe\""), named("café"));
        assert_eq!(filename("form-data; name=\"file\""), None);
        assert_eq!(filename("form-data; filename=\"\""), named(""));
    }

    #[test]
    fn the_boundary_comes_from_the_content_type() {
        assert_eq!(boundary("multipart/form-data; boundary=abc"), Some("abc".to_owned()));
        assert_eq!(boundary("multipart/form-data; charset=x; Boundary=\"a b\""), Some("a b".to_owned()));
        assert_eq!(boundary("multipart/form-data"), None);
    }
}
