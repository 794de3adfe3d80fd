//! rtnetlink for code that blocks: one connection in the netns of the calling thread, one answer at a time.

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Index of `lo` in every netns.
pub(super) const LO_INDEX: u32 = 1;

/// A small runtime for netlink alone. It starts no threads, so the runtime helper may have one.
pub(super) fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_io().build()
}

/// A connection in the netns that the calling thread is in now, whatever netns the thread enters afterwards.
/// Call within [`runtime`]'s context.
pub(super) fn connect() -> io::Result<Handle> {
    let (connection, handle, _messages) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// One end of a veth pair that is to be.
#[derive(Debug)]
pub(super) struct VethEnd<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its index, chosen by us so that nobody has to ask for it; `None` lets the kernel choose.
    pub(super) index: Option<u32>,
    /// The netns it is made in; `None` is the connection's.
    pub(super) netns: Option<BorrowedFd<'a>>,
}

impl VethEnd<'_> {
    fn dress<T: Default>(&self, builder: LinkMessageBuilder<T>, mtu: u32) -> LinkMessageBuilder<T> {
        let builder = builder.name(self.name).mtu(mtu);
        let builder = match self.index {
            Some(index) => builder.index(index),
            None => builder,
        };
        match self.netns {
            Some(netns) => builder.setns_by_fd(netns.as_raw_fd()),
            None => builder,
        }
    }
}

/// Both ends made where they belong: 0.7 ms, where moving an end afterwards takes 19 (host.md section 3). `end` is up;
/// `peer` cannot be at birth (the driver's ENOTCONN). The kernel takes an index for `peer` only together with one for
/// `end`.
pub(super) fn veth_pair(end: &VethEnd<'_>, peer: &VethEnd<'_>, mtu: u32) -> LinkMessage {
    let peer = peer.dress(LinkMessageBuilder::<LinkUnspec>::default(), mtu).build();
    let veth = LinkVeth::new(end.name, "").set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    end.dress(veth, mtu).up().build()
}

/// A link that exists to be changed or removed by index.
pub(super) fn link(index: u32) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
}

/// Index of a link by name; `None` when there is none.
pub(super) async fn index_of(handle: &Handle, name: &str) -> io::Result<Option<u32>> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    match found.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(error) if errno(&error) == Some(nix::libc::ENODEV) => Ok(None),
        Err(error) => Err(into_io(error)),
    }
}

/// Packets that a link has received since it was made.
pub(super) async fn packets_received(handle: &Handle, index: u32) -> io::Result<u64> {
    let mut found = handle.link().get().match_index(index).execute();
    let link = found.try_next().await.map_err(into_io)?;
    let counted = link.iter().flat_map(|link| &link.attributes).find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats.rx_packets),
        _ => None,
    });
    counted.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("link {index} counts no packets")))
}

/// Removes a link by name; succeeds when there is none.
pub(super) async fn remove(handle: &Handle, name: &str) -> io::Result<()> {
    let Some(index) = index_of(handle, name).await? else { return Ok(()) };
    match handle.link().del(index).execute().await {
        Err(error) if errno(&error) != Some(nix::libc::ENODEV) => Err(into_io(error)),
        _ => Ok(()),
    }
}

/// The kernel's errno, positive, when that is what an error is.
pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

/// Netlink's errors as what they are: errno values.
pub(super) fn into_io(error: rtnetlink::Error) -> io::Error {
    match errno(&error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(error),
    }
}
