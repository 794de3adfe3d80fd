//! GET /files: a file out of the sandbox, whole, in part or gzipped, streamed as the client takes it.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LAST_MODIFIED, VARY,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::OFlags;

use super::body::{self, BodyWriter, Gone};
use super::conditions::{Conditions, Verdict};
use super::content_type::content_type;
use super::encoding::{Accepted, Coding, NotAcceptable};
use super::store::read_full;
use super::{describe, io_status};
use crate::error::HttpError;
use crate::filesystem::entry::base_name;
use crate::filesystem::ops::is_missing;

const CHUNK_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DownloadError {
    #[error("path '{}' does not exist", path.display())]
    NotFound { path: PathBuf },
    #[error("path '{}' is a directory", path.display())]
    Directory { path: PathBuf },
    #[error(transparent)]
    NotAcceptable(#[from] NotAcceptable),
    #[error("identity encoding not acceptable for Range or conditional request")]
    IdentityNotAcceptable,
    #[error("error opening file '{}'", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What the request says about the form of the answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub(crate) accept_encoding: &'a str,
    pub(crate) conditions: Conditions<'a>,
}

impl Wish<'_> {
    /// Parts and conditions are about the plain bytes.
    fn coding(&self) -> Result<Coding, DownloadError> {
        let accepted = Accepted::parse(self.accept_encoding);
        match self.conditions.want_identity() {
            true if accepted.identity() => Ok(Coding::Identity),
            true => Err(DownloadError::IdentityNotAcceptable),
            false => Ok(accepted.choose()?),
        }
    }
}

/// An answer whose body is still to be made.
#[derive(Debug)]
pub(crate) struct Download {
    status: StatusCode,
    headers: HeaderMap,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Whole(Bytes),
    /// What `first` holds has been read from `file` already.
    Stream {
        first: Vec<u8>,
        file: File,
        length: Length,
    },
    Gzip {
        first: Vec<u8>,
        file: File,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Length {
    /// Promised by Content-Length: a file that shrinks meanwhile cuts the answer off.
    Exactly(u64),
    /// Devices, pipes, and files of procfs that call themselves empty.
    UntilEnd,
}

/// Opens the file and reads its beginning. Blocks.
pub(crate) fn open(path: &Path, wish: Wish<'_>) -> Result<Download, DownloadError> {
    let failed = |source| match is_missing(&source) {
        true => DownloadError::NotFound { path: path.to_owned() },
        false => DownloadError::Io { path: path.to_owned(), source },
    };
    if fs::metadata(path).map_err(failed)?.is_dir() {
        return Err(DownloadError::Directory { path: path.to_owned() });
    }
    let coding = wish.coding()?;
    // Never waits for a pipe's other end; reading does.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    rustix::io::ioctl_fionbio(&file, false).map_err(|errno| failed(errno.into()))?;
    let found = file.metadata().map_err(failed)?;
    let download = Download::headed(path, &found);
    match found.is_file() {
        true => download.regular(file, &found, coding, &wish.conditions).map_err(failed),
        false => Ok(download.endless(file, coding)),
    }
}

impl Download {
    fn headed(path: &Path, found: &Metadata) -> Download {
        let mut headers = HeaderMap::new();
        let name = base_name(path);
        headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type(&name)));
        headers.insert(CONTENT_DISPOSITION, disposition(&name));
        if let Some(date) = found.modified().ok().filter(|date| *date > SystemTime::UNIX_EPOCH) {
            headers.insert(LAST_MODIFIED, ascii(httpdate::fmt_http_date(date)));
        }
        Download { status: StatusCode::OK, headers, content: Content::Whole(Bytes::new()) }
    }

    fn regular(mut self, mut file: File, found: &Metadata, coding: Coding, conditions: &Conditions<'_>) -> io::Result<Download> {
        let size = found.len();
        // A size of 0 may be a lie (procfs): what there is to read decides.
        let verdict = match size {
            0 => Verdict::Whole,
            _ => conditions.judge(found.modified()?, size),
        };
        let (start, length) = match verdict {
            Verdict::NotModified => return Ok(self.bodiless(StatusCode::NOT_MODIFIED)),
            Verdict::PreconditionFailed => return Ok(self.bodiless(StatusCode::PRECONDITION_FAILED)),
            Verdict::Unsatisfiable => {
                self.headers.insert(CONTENT_RANGE, ascii(format!("bytes */{size}")));
                return Ok(self.bodiless(StatusCode::RANGE_NOT_SATISFIABLE));
            }
            Verdict::Part { start, length } => {
                self.status = StatusCode::PARTIAL_CONTENT;
                let range = format!("bytes {start}-{}/{size}", start + length - 1);
                self.headers.insert(CONTENT_RANGE, ascii(range));
                (start, Length::Exactly(length))
            }
            Verdict::Whole if size == 0 => (0, Length::UntilEnd),
            Verdict::Whole => (0, Length::Exactly(size)),
        };
        if start > 0 {
            file.seek(SeekFrom::Start(start))?;
        }
        self.begin(file, length, coding)
    }

    /// Reads the beginning: small files are answered whole, and gzip shows whether it pays.
    fn begin(mut self, mut file: File, length: Length, coding: Coding) -> io::Result<Download> {
        let most = match length {
            Length::Exactly(length) => usize::try_from(length).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES),
            Length::UntilEnd => CHUNK_BYTES,
        };
        let mut first = vec![0; most];
        let read = read_full(&mut file, &mut first)?;
        first.truncate(read);
        // At the end already: for UntilEnd a full buffer says nothing about that.
        let is_all = read < most || length == Length::Exactly(most as u64);
        if coding == Coding::Gzip && (is_all || shrinks(&first)) {
            self.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            self.content = match is_all {
                true => Content::Whole(gzipped(&first)?),
                false => Content::Gzip { first, file },
            };
            return Ok(self);
        }
        self.headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        self.content = match is_all {
            true => Content::Whole(Bytes::from(first)),
            false => {
                if let Length::Exactly(length) = length {
                    self.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
                }
                Content::Stream { first, file, length }
            }
        };
        Ok(self)
    }

    /// Pipes and devices: reading may wait, so nothing is read before the answer begins.
    fn endless(mut self, file: File, coding: Coding) -> Download {
        self.content = match coding {
            Coding::Identity => Content::Stream { first: Vec::new(), file, length: Length::UntilEnd },
            Coding::Gzip => {
                self.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                Content::Gzip { first: Vec::new(), file }
            }
        };
        self
    }

    fn bodiless(mut self, status: StatusCode) -> Download {
        self.status = status;
        for header in [CONTENT_TYPE, CONTENT_DISPOSITION] {
            self.headers.remove(header);
        }
        self
    }
}

impl IntoResponse for Download {
    fn into_response(self) -> Response {
        let body = match self.content {
            Content::Whole(bytes) => Body::from(bytes),
            Content::Stream { first, file, length } => body::produced(move |writer| {
                if let Err(error) = stream(&writer, first, file, length) {
                    writer.fail(error);
                }
            }),
            Content::Gzip { first, file } => body::produced(move |writer| {
                if let Err(error) = stream_gzipped(&writer, &first, file) {
                    writer.fail(error);
                }
            }),
        };
        (self.status, self.headers, body).into_response()
    }
}

fn stream(writer: &BodyWriter, first: Vec<u8>, mut file: File, length: Length) -> io::Result<()> {
    let mut rest = match length {
        Length::Exactly(length) => length,
        Length::UntilEnd => u64::MAX,
    };
    let mut chunk = first;
    loop {
        rest -= chunk.len() as u64;
        if !chunk.is_empty() && writer.send(Bytes::from(chunk)).is_err() {
            return Ok(());
        }
        let most = usize::try_from(rest).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        chunk = vec![0; most];
        let read = file.read(&mut chunk)?;
        chunk.truncate(read);
        match (read, length) {
            (0, Length::Exactly(_)) if rest > 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            (0, _) => return Ok(()),
            _ => {}
        }
    }
}

fn stream_gzipped(writer: &BodyWriter, first: &[u8], mut file: File) -> io::Result<()> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(CHUNK_BYTES), Compression::fast());
    encoder.write_all(first)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = file.read(&mut chunk)?;
        encoder.write_all(&chunk[..read])?;
        if read == 0 {
            break;
        }
        if encoder.get_ref().len() >= CHUNK_BYTES / 2 {
            let compressed = Bytes::from(std::mem::take(encoder.get_mut()));
            if let Err(Gone) = writer.send(compressed) {
                return Ok(());
            }
        }
    }
    let rest = encoder.finish()?;
    match writer.send(Bytes::from(rest)) {
        Ok(()) | Err(Gone) => Ok(()),
    }
}

fn gzipped(bytes: &[u8]) -> io::Result<Bytes> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(Bytes::from(encoder.finish()?))
}

/// Archives and images do not: then gzip costs time at both ends for nothing.
fn shrinks(bytes: &[u8]) -> bool {
    gzipped(bytes).is_ok_and(|compressed| compressed.len() < bytes.len() / 10 * 9)
}

/// As Go writes it: a bare token, a quoted string, or RFC 2231's spelling of what is not ASCII.
fn disposition(name: &str) -> HeaderValue {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`{|}~".contains(&byte);
    let is_attribute = |byte: u8| is_token(byte) && !b"*'%".contains(&byte);
    let is_quotable = |byte: u8| (0x20..0x7f).contains(&byte);
    let parameter = if !name.is_empty() && name.bytes().all(is_token) {
        format!("filename={name}")
    } else if name.bytes().all(is_quotable) {
        format!("filename=\"{}\"", name.replace('\\', "\\\\").replace('"', "\\\""))
    } else {
        let encode = |byte: u8| match is_attribute(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        };
        format!("filename*=utf-8''{}", name.bytes().map(encode).collect::<String>())
    };
    ascii(format!("inline; {parameter}"))
}

fn ascii(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("made of printable ASCII")
}

impl From<DownloadError> for HttpError {
    fn from(error: DownloadError) -> HttpError {
        let status = match &error {
            DownloadError::NotFound { .. } => StatusCode::NOT_FOUND,
            DownloadError::Directory { .. } => StatusCode::BAD_REQUEST,
            DownloadError::NotAcceptable(_) | DownloadError::IdentityNotAcceptable => StatusCode::NOT_ACCEPTABLE,
            DownloadError::Io { source, .. } => io_status(source),
        };
        HttpError::new(status, describe(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_spelled_as_go_spells_them() {
        let spelled = |name: &str| disposition(name).to_str().unwrap().to_owned();
        assert_eq!(spelled("a-b.txt"), "inline; filename=a-b.txt");
        assert_eq!(spelled("a b.txt"), "inline; filename=\"a b.txt\"");
        assert_eq!(spelled("a\"b\\c"), "inline; filename=\"a\\\"b\\\\c\"");
        assert_eq!(spelled("café 1"), "inline; filename*=utf-8''caf%C3%A9%201");
        assert_eq!(spelled("a\nb"), "inline; filename*=utf-8''a%0Ab");
    }

    #[test]
    fn gzip_pays_for_text_and_not_for_noise() {
        let mut noise = vec![0; CHUNK_BYTES];
        File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
        assert!(!shrinks(&noise));
        assert!(shrinks(&b"text and more text ".repeat(1000)));
    }
}
