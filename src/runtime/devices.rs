//! The devices of a sandbox: the same static nodes in each, and nothing else can be opened.

use crate::sys::device_policy::CharDevice;

/// A character device that every sandbox has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNode {
    /// Name below /dev.
    pub name: &'static str,
    /// Driver.
    pub major: u32,
    /// Device.
    pub minor: u32,
}

const fn node(name: &'static str, major: u32, minor: u32) -> DeviceNode {
    DeviceNode { name, major, minor }
}

/// Made by us on the sandbox's own disk, mode 0666; an image's own nodes are dropped at import.
pub const DEVICE_NODES: [DeviceNode; 7] = [
    node("null", 1, 3),
    node("zero", 1, 5),
    node("full", 1, 7),
    node("random", 1, 8),
    node("urandom", 1, 9),
    node("tty", 5, 0),
    node("fuse", 10, 229),
];

/// What may be opened: the nodes above, and the terminals of the sandbox's own devpts.
pub fn allowed_devices() -> Vec<CharDevice> {
    let nodes = DEVICE_NODES.map(|node| CharDevice { major: node.major, minor: Some(node.minor) });
    let terminals = [CharDevice { major: 5, minor: Some(2) }, CharDevice { major: 136, minor: None }];
    nodes.into_iter().chain(terminals).collect()
}
