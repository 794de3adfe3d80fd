//! Messages with open descriptors in them, between two processes of ours.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors in one message.
const DESCRIPTORS_MAX: usize = 3;

/// Sends a message that is not empty, and copies of these descriptors with it.
pub fn send(socket: BorrowedFd<'_>, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Waits for a message. Returns its length, 0 when the other side has closed, and what came with it.
pub fn receive(socket: BorrowedFd<'_>, text: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut slices = [IoSliceMut::new(text)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(given) = part {
            // SAFETY: the kernel has just made these descriptors for us and nobody else knows them.
            descriptors.extend(given.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_message_brings_its_descriptors_and_the_end_brings_nothing() {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(ours.as_fd(), b"take", &[writer.as_fd()]).unwrap();
        drop(writer);
        let mut text = [0; 8];
        let (length, mut descriptors) = receive(theirs.as_fd(), &mut text).unwrap();
        assert_eq!((&text[..length], descriptors.len()), (&b"take"[..], 1));
        std::fs::File::from(descriptors.remove(0)).write_all(b"through it").unwrap();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "through it");
        drop(ours);
        let (length, descriptors) = receive(theirs.as_fd(), &mut text).unwrap();
        assert_eq!((length, descriptors.len()), (0, 0));
    }
}
