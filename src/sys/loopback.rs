//! A loopback device that carries nothing for a while (rtnetlink(7), tc(8)).

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::os::fd::AsRawFd;

const NEW_QDISC: u16 = 36;
const DELETE_QDISC: u16 = 37;
const REQUEST: u16 = 0x1;
const ACKNOWLEDGE: u16 = 0x4;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;

const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const ROOT: u32 = u32::MAX;
/// lo's number in every network namespace.
const LO: i32 = 1;

/// Drops from now on what is sent over lo in the calling thread's network namespace, without telling the sender more than
/// a full queue would: a queue with room for nothing. Undone by [`unmute`].
pub fn mute() -> io::Result<()> {
    let mut queue = attribute(KIND, b"pfifo\0")?;
    queue.extend(attribute(OPTIONS, &0_u32.to_ne_bytes())?);
    ask(NEW_QDISC, REQUEST | ACKNOWLEDGE | CREATE | REPLACE, &queue)
}

/// lo carries everything again.
pub fn unmute() -> io::Result<()> {
    ask(DELETE_QDISC, REQUEST | ACKNOWLEDGE, &[])
}

fn attribute(kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(4 + value.len()).map_err(io::Error::other)?;
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    Ok(bytes)
}

/// One `struct tcmsg` about lo's root queue, and the kernel's answer.
fn ask(kind: u16, flags: u16, attributes: &[u8]) -> io::Result<()> {
    let mut body = vec![0; 4];
    body.extend(LO.to_ne_bytes());
    body.extend(0_u32.to_ne_bytes());
    body.extend(ROOT.to_ne_bytes());
    body.extend(0_u32.to_ne_bytes());
    body.extend(attributes);
    let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // sequence number and port: one request at a time
    message.extend(body);
    let link = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(link.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 1024];
    let length = recv(link.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // Behind the header of an NLMSG_ERROR, which is all that is acknowledged with.
    let code = answer[..length].get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns::{Netns, bring_loopback_up, unpin};
    use std::net::UdpSocket;
    use std::time::Duration;

    #[test]
    fn a_muted_loopback_carries_nothing_until_it_is_unmuted() {
        let folder = tempfile::tempdir().unwrap();
        let pin = folder.path().join("netns");
        let netns = Netns::create_pinned(&pin).unwrap();
        let received = netns.run(|| {
            bring_loopback_up()?;
            let (from, to) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
            to.set_read_timeout(Some(Duration::from_millis(200)))?;
            let arrives = || {
                let _a_full_queue_may_be_told = from.send_to(b"x", to.local_addr()?);
                Ok::<_, io::Error>(to.recv(&mut [0; 8]).is_ok())
            };
            let before = arrives()?;
            mute()?;
            let muted = arrives()?;
            unmute()?;
            Ok([before, muted, arrives()?])
        });
        unpin(&pin).unwrap();
        assert_eq!(received.unwrap(), [true, false, true]);
    }
}
