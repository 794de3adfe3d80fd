//! Forgetting tracked connections of the calling thread's network namespace, over ctnetlink.
//!
//! Messages are made by hand: two requests and the one attribute that is read do not earn a dependency. Deleting by
//! filter exists only since Linux 6.11, so a source's connections are listed and deleted one by one.

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const NESTED: u16 = 0x8000;
const HEADER_BYTES: usize = 16;
const FAMILY_BYTES: usize = 4;

const TUPLE_ORIG: u16 = 1;
const TUPLE_IP: u16 = 1;
const IP_V4_SOURCE: u16 = 1;
const FILTER: u16 = 25;
const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
/// Compare the source address and nothing else.
const FILTER_BY_SOURCE: u32 = 1;

/// Forgets all connections of the namespace.
pub fn flush() -> io::Result<()> {
    let socket = open()?;
    call(&socket, &message(DELETE, REQUEST | ACK, &[]))
}

/// Forgets the IPv4 connections that `source` opened; says how many those were.
pub fn flush_source(source: Ipv4Addr) -> io::Result<usize> {
    let socket = open()?;
    let mut tuples = Vec::new();
    let filter = [
        by_source(source),
        nested(
            FILTER,
            &[attribute(FILTER_ORIG_FLAGS, &FILTER_BY_SOURCE.to_ne_bytes()), attribute(FILTER_REPLY_FLAGS, &0u32.to_ne_bytes())],
        ),
    ];
    send_all(&socket, &message(GET, REQUEST | DUMP, &filter.concat()))?;
    read_answers(&socket, |body| {
        // A kernel that knows no such filter lists everything: look again.
        if let Some(tuple) = find(body, TUPLE_ORIG).filter(|tuple| source_of(tuple) == Some(source)) {
            tuples.push(attribute(TUPLE_ORIG | NESTED, tuple));
        }
    })?;
    let mut forgotten = 0;
    for tuple in tuples {
        match call(&socket, &message(DELETE, REQUEST | ACK, &tuple)) {
            Ok(()) => forgotten += 1,
            // It ended by itself meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

fn by_source(source: Ipv4Addr) -> Vec<u8> {
    nested(TUPLE_ORIG, &[nested(TUPLE_IP, &[attribute(IP_V4_SOURCE, &source.octets())])])
}

fn source_of(tuple: &[u8]) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = find(find(tuple, TUPLE_IP)?, IP_V4_SOURCE)?.try_into().ok()?;
    Some(octets.into())
}

fn open() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?)
}

fn send_all(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    let sent = sendto(socket.as_raw_fd(), message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn call(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    send_all(socket, message)?;
    read_answers(socket, |_| {})
}

/// Hands the attributes of each answer to `each` until the kernel says that this was all.
fn read_answers(socket: &OwnedFd, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while let Some((kind, body, next)) = split_message(rest) {
            match kind {
                DONE => return Ok(()),
                ERROR => return outcome(body),
                _ => each(body.get(FAMILY_BYTES..).unwrap_or_default()),
            }
            rest = next;
        }
    }
}

fn outcome(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

fn message(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + FAMILY_BYTES + attributes.len()).expect("a request is a few dozen bytes");
    let mut message = Vec::with_capacity(64);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([libc::AF_INET.to_ne_bytes()[0], 0, 0, 0]);
    message.extend(attributes);
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("an attribute is a few dozen bytes");
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

/// Kind, body and what comes after the first message; `None` when there is no whole one.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The value of the first attribute of a kind.
fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?) & !NESTED;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_a_tuple_is_found_again() {
        let address = Ipv4Addr::new(10, 1, 2, 3);
        let tuple = by_source(address);
        assert_eq!(find(&tuple, TUPLE_ORIG).and_then(source_of), Some(address));
    }

    #[test]
    fn a_torn_answer_is_no_answer() {
        let whole = message(GET, 0, &by_source(Ipv4Addr::LOCALHOST));
        assert!(split_message(&whole).is_some());
        for length in 0..whole.len() {
            assert!(split_message(&whole[..length]).is_none(), "{length} bytes were taken for a message");
        }
    }
}
