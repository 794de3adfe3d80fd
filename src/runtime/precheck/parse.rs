//! Text of /proc, which the sandbox writes half of: nothing here trusts it or fails on it.

/// What `status` of a process or thread tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) command: String,
    /// Its pid inside the sandbox, if it has one; the host's otherwise.
    pub(super) inner_pid: i32,
    /// Who traces it, as the host sees it; 0 for nobody.
    pub(super) tracer: i32,
    pub(super) is_zombie: bool,
}

pub(super) fn status(text: &str) -> Option<Status> {
    // The name comes first and has its line feeds escaped, so no name can fake another field.
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    // From the namespace of this /proc inwards; nested namespaces of the sandbox's own are a finding anyway.
    let pids = field("NSpid")?.split_ascii_whitespace().map_while(|pid| pid.parse().ok()).collect::<Vec<i32>>();
    Some(Status {
        command: field("Name")?.to_owned(),
        inner_pid: *pids.get(1).or(pids.first())?,
        tracer: field("TracerPid")?.parse().ok()?,
        is_zombie: field("State")?.starts_with(['Z', 'X']),
    })
}

/// A line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u64,
    /// `major:minor` of the file system.
    pub(super) device: String,
    /// Where it is mounted, octal escapes kept.
    pub(super) point: String,
    pub(super) kind: String,
}

/// Lines that cannot be read become mounts of an unknown kind, so that they are refused rather than passed over.
pub(super) fn mountinfo(text: &str) -> Vec<Mount> {
    text.lines().map(|line| mount(line).unwrap_or_else(|| unreadable(line))).collect()
}

fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ');
    let id = fields.next()?.parse().ok()?;
    let device = fields.nth(1)?.to_owned();
    let point = fields.nth(1)?.to_owned();
    Some(Mount { id, device, point, kind: after.split(' ').next()?.to_owned() })
}

fn unreadable(line: &str) -> Mount {
    Mount { id: 0, device: String::new(), point: line.chars().take(60).collect(), kind: "unreadable".to_owned() }
}

/// Device and inode of a line of `maps`, if it is memory that CRIU writes to a file of its own: shared, and of no disk.
pub(super) fn shared_memory(line: &str) -> Option<(String, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (permissions, device) = (fields.nth(1)?, fields.nth(1)?);
    let inode = fields.next()?.parse().ok()?;
    (permissions.ends_with('s') && device.starts_with("00:")).then(|| (device.to_owned(), inode))
}

/// `mnt_id` of an fdinfo file.
pub(super) fn mount_id(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// A name from inside, fit for a terminal, a log line and a JSON body: letters, digits, ASCII signs and spaces, of
/// limited length.
pub(super) fn printable(name: &str) -> String {
    let shown = |c: char| if c.is_alphanumeric() || c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let text: String = name.chars().take(64).map(shown).collect();
    match text.trim().is_empty() {
        true => "?".to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_status_is_read() {
        let text = "Name:\tpython3\nUmask:\t0022\nState:\tS (sleeping)\nPid:\t4711\nTracerPid:\t0\nNSpid:\t4711\t12\n";
        let status = status(text).unwrap();
        assert_eq!(status, Status { command: "python3".into(), inner_pid: 12, tracer: 0, is_zombie: false });
    }

    #[test]
    fn a_name_cannot_fake_a_field() {
        let text = "Name:\tx\\nTracerPid: 0\nState:\tT (tracing stop)\nTracerPid:\t99\nNSpid:\t5\t2\n";
        assert_eq!(status(text).unwrap().tracer, 99);
    }

    #[test]
    fn a_mount_is_read_with_and_without_optional_fields() {
        let plain = "45 40 0:52 / / rw,relatime - overlay overlay rw,lowerdir=a";
        let shared = "46 45 0:53 /sub /mnt/a\\040b rw master:1 propagate_from:2 - tmpfs none rw";
        let mounts = mountinfo(&format!("{plain}\n{shared}\n"));
        assert_eq!(mounts[0], Mount { id: 45, device: "0:52".into(), point: "/".into(), kind: "overlay".into() });
        assert_eq!(mounts[1], Mount { id: 46, device: "0:53".into(), point: "/mnt/a\\040b".into(), kind: "tmpfs".into() });
    }

    #[test]
    fn memory_is_told_from_files_and_shared_from_private() {
        let shared = "7f0000000000-7f0000001000 rw-s 00000000 00:01 4711                       /dev/zero (deleted)";
        assert_eq!(shared_memory(shared), Some(("00:01".to_owned(), 4711)));
        assert_eq!(shared_memory("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 "), None);
        assert_eq!(shared_memory("7f0000000000-7f0000001000 rw-s 00000000 07:03 12 /home/user/db"), None);
        assert_eq!(shared_memory("7f00"), None);
    }

    #[test]
    fn a_cut_line_is_not_passed_over() {
        assert_eq!(mountinfo("45 40 0:52 /")[0].kind, "unreadable");
    }

    #[test]
    fn hostile_names_are_made_harmless() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{202e}c"), "a?[2Jb??c");
        assert_eq!(printable("  "), "?");
        assert_eq!(printable(&"x".repeat(500)).len(), 64);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text: String) {
            let _ = (status(&text), mountinfo(&text), mount_id(&text), shared_memory(&text));
            prop_assert!(printable(&text).chars().all(|c| !c.is_control()));
        }
    }
}
