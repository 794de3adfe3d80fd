//! Hostile archives, and what a good one becomes.

use super::*;
use std::os::unix::fs::MetadataExt;
use tar::EntryType;

/// One entry of an archive under test, written without the tar crate's own checks of names.
struct Sample<'a> {
    kind: EntryType,
    path: &'a str,
    link: &'a str,
    content: &'a [u8],
}

fn file(path: &str) -> Sample<'_> {
    Sample { kind: EntryType::Regular, path, link: "", content: b"x" }
}

fn special<'a>(kind: EntryType, path: &'a str, link: &'a str) -> Sample<'a> {
    Sample { kind, path, link, content: b"" }
}

fn tar_of(samples: &[Sample<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for sample in samples {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..sample.path.len()].copy_from_slice(sample.path.as_bytes());
        header.as_gnu_mut().unwrap().linkname[..sample.link.len()].copy_from_slice(sample.link.as_bytes());
        header.set_entry_type(sample.kind);
        header.set_size(sample.content.len() as u64);
        header.set_mode(0o640);
        let me = fs::metadata(".").unwrap();
        header.set_uid(u64::from(me.uid()));
        header.set_gid(u64::from(me.gid()));
        header.set_mtime(1_700_000_000);
        header.set_cksum();
        tar.append(&header, sample.content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn unpacked(tar: &[u8], limits: UnpackLimits) -> (tempfile::TempDir, Result<Unpacked, UnpackError>) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("rootfs")).unwrap();
    let outcome = unpack(tar, &folder.path().join("rootfs"), limits);
    (folder, outcome)
}

fn refusal(samples: &[Sample<'_>]) -> String {
    let (folder, outcome) = unpacked(&tar_of(samples), UnpackLimits::default());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was written outside");
    outcome.unwrap_err().to_string()
}

#[test]
fn a_path_that_leads_out_is_refused_by_name() {
    assert_eq!(refusal(&[file("../escaped")]), "archive entry '../escaped' is refused: its path has '..'");
    assert_eq!(refusal(&[file("a/../../escaped")]), "archive entry 'a/../../escaped' is refused: its path has '..'");
    assert_eq!(refusal(&[file("/etc/escaped")]), "archive entry '/etc/escaped' is refused: its path is absolute");
}

#[test]
fn nothing_is_written_through_a_link() {
    let through = [special(EntryType::Symlink, "out", "/tmp"), file("out/escaped")];
    assert_eq!(refusal(&through), "archive entry 'out/escaped' is refused: its path leads through a link");
    let onto = [special(EntryType::Symlink, "out", "../escaped"), file("out")];
    assert_eq!(refusal(&onto), "archive entry 'out' is refused: the archive has an earlier entry of this name");
    let folder_onto = [special(EntryType::Symlink, "out", ".."), special(EntryType::Directory, "out", "")];
    assert_eq!(refusal(&folder_onto), "archive entry 'out' is refused: the archive has an earlier entry of this name");
}

#[test]
fn a_hard_link_reaches_only_files_of_the_archive() {
    let out = refusal(&[special(EntryType::Link, "stolen", "/etc/passwd")]);
    assert!(out.contains("it links to '/etc/passwd', and there its path is absolute"), "{out}");
    let up = refusal(&[special(EntryType::Link, "stolen", "../../etc/passwd")]);
    assert!(up.contains("its path has '..'"), "{up}");
    let absent = refusal(&[special(EntryType::Link, "stolen", "etc/passwd")]);
    assert!(absent.contains("'stolen' is refused: it links to 'etc/passwd', which the archive does not have before it"), "{absent}");
}

#[test]
fn device_nodes_are_refused_and_those_below_dev_left_out() {
    for kind in [EntryType::Block, EntryType::Char] {
        let message = refusal(&[special(kind, "srv/disk", "")]);
        assert!(message.starts_with("archive entry 'srv/disk' is refused: it is a device node"), "{message}");
    }
    let harmless = tar_of(&[special(EntryType::Char, "./dev/console", ""), file("dev/x"), file("device"), file("./dev/pts/0")]);
    let (folder, outcome) = unpacked(&harmless, UnpackLimits::default());
    assert_eq!(outcome.unwrap(), Unpacked { entries: 1, bytes: 1, left_out: 3 });
    assert!(folder.path().join("rootfs/device").exists() && !folder.path().join("rootfs/dev").exists());
}

#[test]
fn a_bomb_is_named_and_stopped_at_the_limit() {
    let two = tar_of(&[file("first"), Sample { content: &[0; 5000], ..file("large") }]);
    let limits = UnpackLimits { bytes_max: ByteSize(4096), entries_max: 10, ..UnpackLimits::default() };
    let (folder, outcome) = unpacked(&two, limits);
    assert_eq!(
        outcome.unwrap_err().to_string(),
        "archive entry 'large' goes beyond 4 KiB; if the archive is to be trusted, raise template.import_bytes_max"
    );
    assert!(fs::metadata(folder.path().join("rootfs/large")).unwrap().len() <= 4096);
    let limits = UnpackLimits { bytes_max: ByteSize::mib(1), entries_max: 1, ..UnpackLimits::default() };
    let (_folder, outcome) = unpacked(&two, limits);
    assert!(outcome.unwrap_err().to_string().contains("'large' goes beyond 1 entries"));
}

#[test]
fn a_name_of_many_megabytes_is_not_read_into_memory() {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let endless = header.as_bytes().chain(io::repeat(b'a'));
    let folder = tempfile::tempdir().unwrap();
    let error = unpack(endless, folder.path(), UnpackLimits::default()).unwrap_err();
    let UnpackError::Damaged { after, source } = error else { panic!("{error}") };
    assert_eq!((after.as_str(), source.to_string().contains("larger than 1 MiB")), ("(start)", true), "{source}");
}

#[test]
fn what_is_left_out_may_be_large_and_has_an_end() {
    let large = tar_of(&[Sample { content: &vec![7; 3 << 20], ..file("dev/x") }, file("after")]);
    let (folder, outcome) = unpacked(&large, UnpackLimits::default());
    assert_eq!(outcome.unwrap(), Unpacked { entries: 1, bytes: 1, left_out: 1 });
    assert!(folder.path().join("rootfs/after").exists());
    let (_folder, outcome) = unpacked(&large, UnpackLimits { bytes_max: ByteSize::mib(1), entries_max: 10, ..UnpackLimits::default() });
    assert!(outcome.unwrap_err().to_string().contains("'dev/x' goes beyond 1 MiB"));
}

#[test]
fn overlayfs_orders_are_refused() {
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_pax_extensions([("SCHILY.xattr.trusted.overlay.redirect", b"/etc".as_slice())]).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(EntryType::Directory);
    tar.append_data(&mut header, "sneaky", io::empty()).unwrap();
    let (_folder, outcome) = unpacked(&tar.into_inner().unwrap(), UnpackLimits::default());
    let message = outcome.unwrap_err().to_string();
    assert_eq!(message, "archive entry 'sneaky' is refused: it carries the attribute 'trusted.overlay.redirect'");
}

#[test]
fn an_archive_that_ends_early_is_damaged() {
    let whole = tar_of(&[file("first"), Sample { content: &[7; 3000], ..file("second") }]);
    let (_folder, outcome) = unpacked(&whole[..whole.len() - 3000], UnpackLimits::default());
    assert!(outcome.is_err(), "{outcome:?}");
    let (_folder, outcome) = unpacked(b"this is no tar, but it is long enough", UnpackLimits::default());
    assert!(outcome.is_err(), "{outcome:?}");
}

#[test]
fn files_keep_their_mode_and_time_and_folders_get_theirs_last() {
    let tar = tar_of(&[special(EntryType::Directory, "closed", ""), file("closed/within"), special(EntryType::Symlink, "etc", "/closed")]);
    let (folder, outcome) = unpacked(&tar, UnpackLimits::default());
    outcome.unwrap();
    for name in ["closed", "closed/within"] {
        let metadata = fs::metadata(folder.path().join("rootfs").join(name)).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.mtime()), (0o640, 1_700_000_000), "{name}");
    }
    assert_eq!(fs::read_link(folder.path().join("rootfs/etc")).unwrap(), Path::new("/closed"));
}

/// An entry that a layer's tar has in place of something gone.
fn mark(path: &str) -> Sample<'_> {
    Sample { content: b"", ..file(path) }
}

#[test]
fn what_a_layer_takes_away_becomes_overlays_own_marks() {
    let tar = tar_of(&[
        special(EntryType::Directory, "var", ""),
        mark("var/.wh..wh..opq"),
        file("var/new"),
        mark("etc/.wh.motd"),
        mark("etc/.wh..wh.plnk"),
        mark(".wh.dev"),
    ]);
    let (folder, outcome) = unpacked(&tar, UnpackLimits::default());
    outcome.unwrap();
    let rootfs = folder.path().join("rootfs");
    assert!(whiteout::is_opaque(&rootfs.join("var")).unwrap() && !whiteout::is_opaque(&rootfs.join("etc")).unwrap());
    assert!(whiteout::is_gone(&fs::symlink_metadata(rootfs.join("etc/motd")).unwrap()));
    assert_eq!(fs::read_dir(rootfs.join("etc")).unwrap().count(), 1, "aufs' notes are no files");
}

#[test]
fn a_layer_that_takes_away_and_brings_anew_hides_what_is_below() {
    let before = [mark(".wh.opt"), file("opt/new"), mark(".wh.file"), file("file")];
    let after = [file("opt/new"), mark(".wh.opt"), file("file"), mark(".wh.file")];
    for order in [before, after] {
        let (folder, outcome) = unpacked(&tar_of(&order), UnpackLimits::default());
        outcome.unwrap();
        let rootfs = folder.path().join("rootfs");
        assert!(whiteout::is_opaque(&rootfs.join("opt")).unwrap());
        assert!(rootfs.join("opt/new").is_file() && rootfs.join("file").is_file());
    }
}

#[test]
fn a_layer_with_marks_has_the_same_id_after_it_travelled() {
    let tar = tar_of(&[special(EntryType::Directory, "var", ""), mark("var/.wh..wh..opq"), mark("etc/.wh.motd"), file("x")]);
    let (folder, outcome) = unpacked(&tar, UnpackLimits::default());
    outcome.unwrap();
    let mut packed = Vec::new();
    super::super::layer::write_tar(&folder.path().join("rootfs"), &mut packed).unwrap();
    let (again, outcome) = unpacked(&packed, UnpackLimits::default());
    outcome.unwrap();
    let id = |folder: &tempfile::TempDir| super::super::layer::id_of(&folder.path().join("rootfs")).unwrap();
    assert_eq!(id(&folder), id(&again));
}

#[test]
fn a_mark_takes_nothing_away_elsewhere() {
    assert_eq!(refusal(&[mark("etc/.wh...")]), "archive entry 'etc/.wh...' is refused: it takes away what has no name");
    let through = [special(EntryType::Symlink, "out", "/etc"), mark("out/.wh.passwd")];
    assert_eq!(refusal(&through), "archive entry 'out/.wh.passwd' is refused: its path leads through a link");
}

#[test]
fn what_the_agent_keeps_is_not_the_images_to_bring() {
    let (folder, outcome) = unpacked(&tar_of(&[file("run/stillbox/agent"), file("run/lock")]), UnpackLimits::default());
    assert_eq!(outcome.unwrap().left_out, 1);
    assert!(!folder.path().join("rootfs/run/stillbox").exists());
}

/// What names and attributes come to until the end, which is far more than the archive when it is packed.
fn outcome_with(held: Held, tar: &[u8]) -> Result<(), UnpackError> {
    let folder = tempfile::tempdir().unwrap();
    let mut target = Target::new(folder.path(), UnpackLimits::default());
    target.held = held;
    let mut archive = tar::Archive::new(tar);
    archive.entries().unwrap().try_for_each(|entry| target.place(&mut entry.unwrap()))
}

#[test]
fn names_and_attributes_that_fill_the_memory_are_refused() {
    let files = tar_of(&[file("0123456789"), file("9876543210")]);
    outcome_with(Held::of(20), &files).unwrap();
    let error = outcome_with(Held::of(19), &files).unwrap_err().to_string();
    assert!(error.contains("'9876543210' is refused: the names and attributes before it take"), "{error}");
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_pax_extensions([("SCHILY.xattr.user.note", [b'x'; 1000].as_slice())]).unwrap();
    let folder = tar_of(&[special(EntryType::Directory, "folder", "")]);
    let with_attribute = [tar.get_ref().as_slice(), &folder].concat();
    outcome_with(Held::of(1100), &with_attribute).unwrap();
    assert!(outcome_with(Held::of(1000), &with_attribute).is_err());
}

#[test]
fn what_is_kept_free_of_the_hosts_disk_is_not_unpacked_to() {
    let limits = UnpackLimits { free_min: ByteSize(u64::MAX), ..UnpackLimits::default() };
    let (_folder, outcome) = unpacked(&tar_of(&[file("a")]), limits);
    let error = outcome.unwrap_err();
    let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(why.contains("runtime.disk_free_min"), "{error}: {why}");
}
