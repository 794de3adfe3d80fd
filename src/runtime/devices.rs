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

/// What may be opened: the nodes above, the terminals of the sandbox's own devpts, and userfaultfd.
///
/// CRIU fills a lazily restored sandbox through /dev/userfaultfd, which it opens on the host's /dev from within the
/// sandbox's cgroup. No sandbox has that node, and none can make one.
pub fn allowed_devices() -> Vec<CharDevice> {
    let nodes = DEVICE_NODES.map(|node| CharDevice { major: node.major, minor: Some(node.minor) });
    let terminals = [CharDevice { major: 5, minor: Some(2) }, CharDevice { major: 136, minor: None }];
    nodes.into_iter().chain(terminals).chain(userfaultfd()).collect()
}

/// Since 6.1; its minor is given out at boot. `None` where there is no such device: nothing is restored lazily there.
pub fn userfaultfd() -> Option<CharDevice> {
    device_of(&std::fs::read_to_string("/sys/class/misc/userfaultfd/dev").ok()?)
}

/// `MAJOR:MINOR` and a newline, as sysfs writes it.
fn device_of(text: &str) -> Option<CharDevice> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(CharDevice { major: major.parse().ok()?, minor: Some(minor.parse().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_sysfs_writes_it() {
        assert_eq!(device_of("10:257\n"), Some(CharDevice { major: 10, minor: Some(257) }));
        assert_eq!(device_of("nonsense"), None);
    }
}
