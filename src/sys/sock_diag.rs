//! The kernel's TCP sockets of the calling thread's network namespace, and how to end them (sock_diag(7)).
//!
//! SOCK_DESTROY is the only way to end a connection of a process that does not take part: the application gets
//! ECONNABORTED, the peer a reset.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Size of `struct inet_diag_sockid`.
const SOCKET_ID: usize = 48;
/// Where the socket id starts in `struct inet_diag_msg`, after family, state, timer and retransmits.
const ID_IN_ANSWER: usize = 4;

/// All states but LISTEN and CLOSE: those that have a peer. Bits are the kernel's `TCP_*` numbers.
const STATES_WITH_PEER: u32 = {
    let (listen, close, all) = (1 << 10, 1 << 7, 0xfff);
    all & !listen & !close & !1
};

/// Resets every TCP connection that leads out of this namespace and returns how many there were. Listeners and
/// connections between processes of the namespace stay.
pub fn reset_outside_connections() -> io::Result<usize> {
    let diag = open()?;
    let mut count = 0;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).map_err(io::Error::other)?;
        for connection in connections(&diag, family)? {
            if connection.leads_outside() && destroy(&diag, &connection)? {
                count += 1;
            }
        }
    }
    Ok(count)
}

/// One connection: what the kernel names it by, and its two ends.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Connection {
    family: u8,
    id: [u8; SOCKET_ID],
}

impl Connection {
    fn leads_outside(&self) -> bool {
        let (local, remote) = (self.address(4), self.address(20));
        // A program that dials its own outer address also stays inside.
        !(local == remote || local.is_loopback() || remote.is_loopback())
    }

    /// The address at this offset of the id: 4 is the local, 20 the remote one.
    fn address(&self, offset: usize) -> IpAddr {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.id[offset..offset + 16]);
        match i32::from(self.family) {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
            _ => Ipv6Addr::from(bytes).to_canonical(),
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkSockDiag;
    Ok(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?)
}

/// `struct inet_diag_req_v2` behind its netlink header.
fn request(kind: u16, flags: i32, family: u8, states: u32, id: &[u8; SOCKET_ID]) -> io::Result<Vec<u8>> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | flags).map_err(io::Error::other)?;
    let protocol = u8::try_from(libc::IPPROTO_TCP).map_err(io::Error::other)?;
    let mut body = vec![family, protocol, 0, 0];
    body.extend(states.to_ne_bytes());
    body.extend(id);
    let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // sequence number and port: one request at a time
    message.extend(body);
    Ok(message)
}

fn connections(diag: &OwnedFd, family: u8) -> io::Result<Vec<Connection>> {
    let ask = request(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP, family, STATES_WITH_PEER, &[0; SOCKET_ID])?;
    send(diag.as_raw_fd(), &ask, MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for message in Messages(&buffer[..length]) {
            match message? {
                Message::Done => return Ok(found),
                Message::Status(error) => return Err(error),
                Message::Ok => {}
                Message::Socket(body) => found.extend(connection_in(body)),
            }
        }
    }
}

fn connection_in(body: &[u8]) -> Option<Connection> {
    let id = body.get(ID_IN_ANSWER..ID_IN_ANSWER + SOCKET_ID)?.try_into().ok()?;
    Some(Connection { family: *body.first()?, id })
}

/// Whether there still was one to end.
fn destroy(diag: &OwnedFd, connection: &Connection) -> io::Result<bool> {
    let ask = request(SOCK_DESTROY, libc::NLM_F_ACK, connection.family, STATES_WITH_PEER, &connection.id)?;
    send(diag.as_raw_fd(), &ask, MsgFlags::empty())?;
    let mut buffer = vec![0; 4096];
    let length = recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    for message in Messages(&buffer[..length]) {
        match message? {
            Message::Ok => return Ok(true),
            Message::Status(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            Message::Status(error) => return Err(error),
            Message::Done | Message::Socket(_) => {}
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel did not acknowledge SOCK_DESTROY"))
}

enum Message<'a> {
    Done,
    Ok,
    Status(io::Error),
    Socket(&'a [u8]),
}

/// The netlink messages in a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<Message<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.len() < HEADER {
            return None;
        }
        let length = u32::from_ne_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]) as usize;
        if length < HEADER || length > self.0.len() {
            self.0 = &[];
            return Some(Err(io::ErrorKind::InvalidData.into()));
        }
        let kind = i32::from(u16::from_ne_bytes([self.0[4], self.0[5]]));
        let body = &self.0[HEADER..length];
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(match kind {
            libc::NLMSG_DONE => Ok(Message::Done),
            libc::NLMSG_ERROR => status(body),
            _ => Ok(Message::Socket(body)),
        })
    }
}

fn status(body: &[u8]) -> io::Result<Message<'_>> {
    let code = body.first_chunk::<4>().ok_or(io::ErrorKind::InvalidData)?;
    match i32::from_ne_bytes(*code) {
        0 => Ok(Message::Ok),
        errno => Ok(Message::Status(io::Error::from_raw_os_error(-errno))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(local: &str, remote: &str) -> Connection {
        let mut id = [0; SOCKET_ID];
        let mut family = libc::AF_INET;
        for (offset, text) in [(4, local), (20, remote)] {
            match text.parse().unwrap() {
                IpAddr::V4(ip) => id[offset..offset + 4].copy_from_slice(&ip.octets()),
                IpAddr::V6(ip) => {
                    family = libc::AF_INET6;
                    id[offset..offset + 16].copy_from_slice(&ip.octets());
                }
            }
        }
        Connection { family: u8::try_from(family).unwrap(), id }
    }

    #[test]
    fn connections_inside_the_namespace_are_left_alone() {
        for (local, remote) in [
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.53", "127.0.0.1"),
            ("10.9.0.2", "10.9.0.2"),
            ("::1", "::1"),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ] {
            assert!(!connection(local, remote).leads_outside(), "{local} to {remote}");
        }
        for (local, remote) in [("10.9.0.2", "93.184.216.34"), ("fd00::2", "fd00::3"), ("::ffff:10.9.0.2", "::ffff:1.1.1.1")] {
            assert!(connection(local, remote).leads_outside(), "{local} to {remote}");
        }
    }

    #[test]
    fn a_torn_netlink_message_is_an_error_and_not_a_loop() {
        let mut torn = vec![0; HEADER];
        torn[0] = 200;
        let mut messages = Messages(&torn);
        assert!(matches!(messages.next(), Some(Err(_))));
        assert!(messages.next().is_none());
    }

    #[test]
    fn this_machine_lists_its_connections() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let port = client.local_addr().unwrap().port().to_be_bytes();
        let found = connections(&open().unwrap(), u8::try_from(libc::AF_INET).unwrap()).unwrap();
        assert!(found.iter().any(|c| c.id[..2] == port && !c.leads_outside()), "{} connections found", found.len());
    }
}
