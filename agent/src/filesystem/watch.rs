//! One watch: an inotify instance over a directory or a tree, and the events it means to a client.
//!
//! Every directory of a recursive watch has a kernel watch of its own. A directory that appears gets one as
//! soon as its event is read; what was made in it before that is found by listing it and reported as if the
//! kernel had, once. Nothing here waits: `read` takes what the kernel has queued.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Below the watched directory; the directory itself is `.`.
    pub(crate) name: PathBuf,
    pub(crate) kind: EventKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventKind {
    Create,
    Rename,
    Chmod,
    Write,
    Remove,
}

impl EventKind {
    /// Whether the entry is still there to be described. After REMOVE and RENAME another one may have its name.
    pub(crate) fn carries_entry(self) -> bool {
        match self {
            EventKind::Create | EventKind::Chmod | EventKind::Write => true,
            EventKind::Rename | EventKind::Remove => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The directory's own entries.
    Directory,
    /// The whole tree below it, as it grows.
    Tree,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NetworkMounts {
    Refuse,
    Allow,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    #[error("path {} not found", path.display())]
    NotFound { path: PathBuf },
    #[error("path {} not a directory", path.display())]
    NotDirectory { path: PathBuf },
    #[error("cannot watch path on network filesystem: {}", path.display())]
    NetworkMount { path: PathBuf },
    #[error("too many watches to add {}; raise fs.inotify.max_user_watches or watch less", path.display())]
    TooManyWatches { path: PathBuf },
    #[error("too many watchers; remove some or raise fs.inotify.max_user_instances")]
    TooManyInstances,
    #[error("more changes than the kernel queues (fs.inotify.max_queued_events); some were lost")]
    Overflow,
    #[error("error watching {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What each watched directory reports: fsnotify's set, which E2B's clients know.
const INTEREST: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::ONLYDIR);

/// As many as the kernel queues by default: who makes changes faster than they are read keeps no reader for ever.
const READ_EVENTS_MAX: usize = 16384;

/// Whether the kernel's queue was seen empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    Nothing,
    Perhaps,
}

#[derive(Debug)]
pub(crate) struct Watch {
    /// Shared with the reader, so that directories can be added while it is in use.
    inotify: Arc<OwnedFd>,
    root: PathBuf,
    depth: Depth,
    directories: HashMap<i32, Directory>,
    /// Directories that left their place and may turn up at another one, by the kernel's cookie.
    moving: HashMap<u32, PathBuf>,
}

#[derive(Debug)]
struct Directory {
    /// Below the root; empty for the root itself.
    path: PathBuf,
    /// Entries that a listing has reported while the kernel's own CREATE may still be queued.
    announced: HashSet<OsString>,
}

/// How a directory came to be in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// It was there when the watch began, or was moved here whole.
    Whole,
    /// It was just made: what is in it is as new as itself.
    Made,
}

impl Watch {
    /// Watches `root` from now on: a change after this returns is reported.
    pub(crate) fn open(root: &Path, depth: Depth, mounts: NetworkMounts) -> Result<Watch, WatchError> {
        let root = root.to_owned();
        match fs::metadata(&root) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(WatchError::NotDirectory { path: root }),
            Err(error) => return Err(watch_error(&root, error)),
        }
        if mounts == NetworkMounts::Refuse && is_network_mount(&root)? {
            return Err(WatchError::NetworkMount { path: root });
        }
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(|errno| match errno {
            Errno::MFILE => WatchError::TooManyInstances,
            _ => watch_error(&root, errno.into()),
        })?;
        let (directories, moving) = (HashMap::new(), HashMap::new());
        let mut watch = Watch { inotify: Arc::new(inotify), root, depth, directories, moving };
        watch.add(Path::new(""), Arrival::Whole, &mut |_| {})?;
        Ok(watch)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn depth(&self) -> Depth {
        self.depth
    }

    /// Becomes readable when the kernel has queued something.
    pub(crate) fn readiness(&self) -> Result<AsyncFd<OwnedFd>, WatchError> {
        let fd = self.inotify.try_clone();
        let registered = fd.and_then(|fd| sys::async_fd(fd, Interest::READABLE));
        registered.map_err(|source| watch_error(&self.root, source))
    }

    /// Hands over everything the kernel had queued when this was called, oldest first. After an error the watch
    /// has missed changes and is of no more use.
    pub(crate) fn read(&mut self, sink: &mut dyn FnMut(Event)) -> Result<Left, WatchError> {
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut reader = inotify::Reader::new(Arc::clone(&self.inotify), &mut buffer);
        let mut events = 0;
        // A reader that is dropped in the middle of its buffer loses the rest.
        while events < READ_EVENTS_MAX || !reader.is_buffer_empty() {
            match reader.next() {
                Ok(raw) => {
                    events += 1;
                    let name = raw.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                    let raw = Raw { wd: raw.wd(), flags: raw.events(), cookie: raw.cookie(), name };
                    self.translate(&raw, sink)?;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // Nothing older than the last listing is queued any more.
                    self.directories.values_mut().for_each(|directory| directory.announced = HashSet::new());
                    return Ok(Left::Nothing);
                }
                Err(errno) => return Err(watch_error(&self.root, errno.into())),
            }
        }
        Ok(Left::Perhaps)
    }

    fn translate(&mut self, raw: &Raw<'_>, sink: &mut dyn FnMut(Event)) -> Result<(), WatchError> {
        if raw.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Err(WatchError::Overflow);
        }
        if raw.flags.contains(ReadFlags::IGNORED) {
            self.directories.remove(&raw.wd);
            return Ok(());
        }
        let Some(directory) = self.directories.get_mut(&raw.wd) else {
            return Ok(());
        };
        let Some(name) = raw.name else {
            let path = directory.path.clone();
            return self.translate_own(raw, &path, sink);
        };
        let path = directory.path.join(name);
        let was_announced = if raw.appeared() {
            directory.announced.remove(name)
        } else {
            if raw.disappeared() {
                directory.announced.remove(name);
            }
            false
        };
        if was_announced {
            return Ok(());
        }
        raw.report(&path, sink);
        if self.depth == Depth::Tree && raw.flags.contains(ReadFlags::ISDIR) {
            self.follow(raw, path, sink)?;
        }
        Ok(())
    }

    /// What happened to a watched directory itself. All but the root have a parent that reports it as well.
    fn translate_own(&mut self, raw: &Raw<'_>, path: &Path, sink: &mut dyn FnMut(Event)) -> Result<(), WatchError> {
        if is_root(path) {
            raw.report(Path::new("."), sink);
        }
        if raw.flags.contains(ReadFlags::MOVE_SELF) {
            // The kernel queues MOVED_FROM, MOVED_TO, MOVE_SELF: with no MOVED_TO of ours the tree is gone
            // from below the root, and its paths are not what they were.
            let left_at = self.moving.iter().find(|(_, left)| *left == path).map(|(cookie, _)| *cookie);
            if let Some(cookie) = left_at {
                self.moving.remove(&cookie);
            }
            if is_root(path) || left_at.is_some() {
                self.forget(path);
            }
        }
        Ok(())
    }

    /// Keeps the tree of kernel watches in step with a directory that came, went or moved.
    fn follow(&mut self, raw: &Raw<'_>, path: PathBuf, sink: &mut dyn FnMut(Event)) -> Result<(), WatchError> {
        if raw.flags.contains(ReadFlags::MOVED_FROM) {
            self.moving.insert(raw.cookie, path);
        } else if raw.flags.contains(ReadFlags::MOVED_TO) {
            match self.moving.remove(&raw.cookie) {
                Some(left) => self.rebase(&left, &path),
                None => self.add(&path, Arrival::Whole, sink)?,
            }
        } else if raw.flags.contains(ReadFlags::CREATE) {
            self.add(&path, Arrival::Made, sink)?;
        }
        Ok(())
    }

    /// Adds kernel watches for `path` and, in a tree, for all below it.
    fn add(&mut self, path: &Path, arrival: Arrival, sink: &mut dyn FnMut(Event)) -> Result<(), WatchError> {
        // A list and no recursion: a tree may be deeper than a thread's stack has room for.
        let mut found = vec![path.to_owned()];
        while let Some(path) = found.pop() {
            let full = if is_root(&path) { self.root.clone() } else { self.root.join(&path) };
            let Some(wd) = self.add_one(&path, &full)? else {
                continue;
            };
            if self.depth == Depth::Tree {
                found.extend(self.content(wd, &path, &full, arrival, sink));
            }
        }
        Ok(())
    }

    /// None for a directory below the root that has vanished by now or lies too deep for a path.
    fn add_one(&mut self, path: &Path, full: &Path) -> Result<Option<i32>, WatchError> {
        // Links below the root are entries, not directories; the root itself may be one.
        let flags = if is_root(path) { INTEREST } else { INTEREST | WatchFlags::DONT_FOLLOW };
        let wd = match inotify::add_watch(&self.inotify, full, flags) {
            Ok(wd) => wd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::ACCESS) if !is_root(path) => return Ok(None),
            Err(errno) => return Err(watch_error(full, errno.into())),
        };
        let announced = HashSet::new();
        self.directories.entry(wd).or_insert_with(|| Directory { path: path.to_owned(), announced });
        Ok(Some(wd))
    }

    /// The directories in one directory; what is in a new one is announced.
    fn content(&mut self, wd: i32, path: &Path, full: &Path, arrival: Arrival, sink: &mut dyn FnMut(Event)) -> Vec<PathBuf> {
        let Ok(listing) = fs::read_dir(full) else {
            return Vec::new();
        };
        let mut directories = Vec::new();
        for found in listing.flatten() {
            let below = path.join(found.file_name());
            if arrival == Arrival::Made {
                self.announce(wd, &found, &below, sink);
            }
            if found.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(below);
            }
        }
        directories
    }

    /// Reports an entry that was made before its directory was watched: CREATE, and WRITE if it has content.
    fn announce(&mut self, wd: i32, found: &fs::DirEntry, path: &Path, sink: &mut dyn FnMut(Event)) {
        if let Some(directory) = self.directories.get_mut(&wd) {
            directory.announced.insert(found.file_name());
        }
        sink(Event { name: path.to_owned(), kind: EventKind::Create });
        if found.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0) {
            sink(Event { name: path.to_owned(), kind: EventKind::Write });
        }
    }

    fn rebase(&mut self, left: &Path, path: &Path) {
        for directory in self.directories.values_mut() {
            if let Ok(below) = directory.path.strip_prefix(left) {
                directory.path = if below.as_os_str().is_empty() { path.to_owned() } else { path.join(below) };
            }
        }
    }

    fn forget(&mut self, path: &Path) {
        let gone: Vec<i32> =
            self.directories.iter().filter_map(|(wd, directory)| directory.path.starts_with(path).then_some(*wd)).collect();
        for wd in gone {
            self.directories.remove(&wd);
            // Fails only if the kernel has removed it already.
            let _ = inotify::remove_watch(&self.inotify, wd);
        }
    }
}

fn is_root(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// One event as the kernel tells it.
struct Raw<'a> {
    wd: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Option<&'a OsStr>,
}

impl Raw<'_> {
    fn appeared(&self) -> bool {
        self.flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO)
    }

    fn disappeared(&self) -> bool {
        self.flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM)
    }

    /// The kinds that the flags stand for, in E2B's order.
    fn report(&self, path: &Path, sink: &mut dyn FnMut(Event)) {
        let meanings = [
            (ReadFlags::CREATE | ReadFlags::MOVED_TO, EventKind::Create),
            (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, EventKind::Rename),
            (ReadFlags::ATTRIB, EventKind::Chmod),
            (ReadFlags::MODIFY, EventKind::Write),
            (ReadFlags::DELETE | ReadFlags::DELETE_SELF, EventKind::Remove),
        ];
        for (flags, kind) in meanings {
            if self.flags.intersects(flags) {
                sink(Event { name: path.to_owned(), kind });
            }
        }
    }
}

fn watch_error(path: &Path, source: io::Error) -> WatchError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => WatchError::NotFound { path },
        io::ErrorKind::NotADirectory => WatchError::NotDirectory { path },
        // inotify_add_watch(2) says ENOSPC for its own limit.
        io::ErrorKind::StorageFull => WatchError::TooManyWatches { path },
        _ => WatchError::Io { path, source },
    }
}

/// NFS, CIFS, SMB and FUSE report only the changes made through this very mount, or none.
fn is_network_mount(path: &Path) -> Result<bool, WatchError> {
    const NETWORK: [u32; 5] = [0x6969, 0xff53_4d42, 0x517b, 0xfe53_4d42, 0x6573_5546];
    let found = rustix::fs::statfs(path).map_err(|errno| watch_error(path, errno.into()))?;
    // f_type is a signed word whose low half holds the magic number.
    Ok(NETWORK.iter().any(|magic| i64::from(*magic) == found.f_type & 0xffff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A watch of a new folder and what it has reported so far.
    struct Fixture {
        _guard: tempfile::TempDir,
        root: PathBuf,
        watch: Watch,
    }

    fn watched(depth: Depth) -> Fixture {
        let guard = tempfile::tempdir().unwrap();
        let root = guard.path().to_owned();
        let watch = Watch::open(&root, depth, NetworkMounts::Refuse).unwrap();
        Fixture { _guard: guard, root, watch }
    }

    impl Fixture {
        fn path(&self, below: &str) -> PathBuf {
            self.root.join(below)
        }

        fn events(&mut self) -> Vec<String> {
            let mut events = Vec::new();
            let mut sink = |event: Event| events.push(format!("{:?} {}", event.kind, event.name.display()));
            self.watch.read(&mut sink).unwrap();
            events
        }
    }

    #[test]
    fn a_directory_reports_what_happens_to_its_entries() {
        let mut fixture = watched(Depth::Directory);
        fs::write(fixture.path("f"), "1").unwrap();
        std::os::unix::fs::chown(fixture.path("f"), Some(0), Some(0)).unwrap();
        assert_eq!(fixture.events(), ["Create f", "Write f", "Chmod f"]);
        fs::rename(fixture.path("f"), fixture.path("g")).unwrap();
        assert_eq!(fixture.events(), ["Rename f", "Create g"]);
        fs::remove_file(fixture.path("g")).unwrap();
        assert_eq!(fixture.events(), ["Remove g"]);
        fs::create_dir(fixture.path("d")).unwrap();
        fs::write(fixture.path("d/f"), "1").unwrap();
        assert_eq!(fixture.events(), ["Create d"], "not recursive");
    }

    #[test]
    fn the_watched_directory_itself_is_a_dot() {
        let mut fixture = watched(Depth::Tree);
        fs::remove_dir(&fixture.root).unwrap();
        assert_eq!(fixture.events(), ["Remove ."]);
    }

    #[test]
    fn a_tree_reports_files_in_directories_that_were_there() {
        let guard = tempfile::tempdir().unwrap();
        fs::create_dir_all(guard.path().join("a/b")).unwrap();
        let watch = Watch::open(guard.path(), Depth::Tree, NetworkMounts::Refuse).unwrap();
        let mut fixture = Fixture { root: guard.path().to_owned(), _guard: guard, watch };
        fs::write(fixture.path("a/b/f"), "1").unwrap();
        assert_eq!(fixture.events(), ["Create a/b/f", "Write a/b/f"]);
        std::os::unix::fs::chown(fixture.path("a"), Some(0), Some(0)).unwrap();
        assert_eq!(fixture.events(), ["Chmod a"], "once, though the kernel says it twice");
    }

    #[test]
    fn a_tree_reports_once_what_was_made_in_new_directories_before_they_were_watched() {
        let mut fixture = watched(Depth::Tree);
        fs::create_dir_all(fixture.path("a/b")).unwrap();
        fs::write(fixture.path("a/b/f"), "1").unwrap();
        fs::write(fixture.path("a/empty"), "").unwrap();
        let mut events = fixture.events();
        events.sort();
        assert_eq!(events, ["Create a", "Create a/b", "Create a/b/f", "Create a/empty", "Write a/b/f"]);
        fs::remove_file(fixture.path("a/empty")).unwrap();
        fs::write(fixture.path("a/empty"), "").unwrap();
        assert_eq!(fixture.events(), ["Remove a/empty", "Create a/empty"], "the next one is another file");
    }

    #[test]
    fn nothing_is_lost_or_doubled_while_a_tree_grows_under_the_reader() {
        let mut fixture = watched(Depth::Tree);
        let root = fixture.root.clone();
        let writer = std::thread::spawn(move || {
            for number in 0..200 {
                let directory = root.join(format!("d{number}/inner"));
                fs::create_dir_all(&directory).unwrap();
                fs::write(directory.join("f"), "").unwrap();
            }
        });
        let mut created = Vec::new();
        while !writer.is_finished() {
            created.extend(fixture.events());
        }
        writer.join().unwrap();
        created.extend(fixture.events());
        created.retain(|event| event.starts_with("Create"));
        created.sort();
        let mut expected: Vec<String> =
            (0..200).flat_map(|number| ["", "/inner", "/inner/f"].map(|below| format!("Create d{number}{below}"))).collect();
        expected.sort();
        assert_eq!(created, expected);
    }

    #[test]
    fn a_directory_renamed_within_the_tree_reports_under_its_new_name() {
        let mut fixture = watched(Depth::Tree);
        fs::create_dir_all(fixture.path("a/b")).unwrap();
        fixture.events();
        fs::rename(fixture.path("a"), fixture.path("z")).unwrap();
        assert_eq!(fixture.events(), ["Rename a", "Create z"]);
        fs::write(fixture.path("z/b/f"), "").unwrap();
        assert_eq!(fixture.events(), ["Create z/b/f"]);
    }

    #[test]
    fn a_directory_moved_out_of_the_tree_falls_silent_and_one_moved_in_is_watched() {
        let outside = tempfile::tempdir().unwrap();
        let mut fixture = watched(Depth::Tree);
        fs::create_dir_all(fixture.path("a/b")).unwrap();
        fixture.events();
        let away = outside.path().join("away");
        fs::rename(fixture.path("a"), &away).unwrap();
        fs::write(away.join("b/f"), "").unwrap();
        assert_eq!(fixture.events(), ["Rename a"]);
        fs::write(away.join("b/g"), "").unwrap();
        assert!(fixture.events().is_empty());
        fs::rename(&away, fixture.path("back")).unwrap();
        assert_eq!(fixture.events(), ["Create back"]);
        fs::write(fixture.path("back/b/h"), "").unwrap();
        assert_eq!(fixture.events(), ["Create back/b/h"]);
    }

    #[test]
    fn only_local_directories_can_be_watched() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "").unwrap();
        let error = |path: &Path| Watch::open(path, Depth::Tree, NetworkMounts::Refuse).unwrap_err();
        assert!(matches!(error(&file), WatchError::NotDirectory { .. }));
        assert!(matches!(error(&folder.path().join("nothing")), WatchError::NotFound { .. }));
    }
}
