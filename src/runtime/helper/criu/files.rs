//! The open files of a dump that lie on volumes: others may change those files while the sandbox is paused.
//!
//! CRIU notes size and mode of every open file and restores nothing when they differ. That is right for a sandbox's own
//! disk, which nobody else writes, and wrong for storage that is shared: there a file is what it has become.

use protobuf::CodedInputStream;
use protobuf::rt::WireType;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;

/// The two words at the head of `files.img`.
const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56];

/// `reg` of CRIU's `file_entry`.
const FIELD_REG: u32 = 3;
/// Of its `reg_file_entry`.
const FIELD_MOUNT: u32 = 7;
const FIELD_SIZE: u32 = 8;
const FIELD_MODE: u32 = 10;

/// Why `files.img` was not understood.
#[derive(Debug, thiserror::Error)]
enum FormatError {
    #[error("it has not the magic words of one")]
    Magic,
    #[error("an entry is longer than the file")]
    Length,
    #[error(transparent)]
    Protobuf(#[from] protobuf::Error),
}

/// Makes the dump in `images` forget what files on these mounts looked like. The tasks may not run yet.
pub(crate) fn forget_sizes(images: &Path, mounts: &BTreeSet<u32>) -> io::Result<()> {
    let path = images.join("files.img");
    let changed = forgetful(&std::fs::read(&path)?, mounts);
    let changed = changed.map_err(|error| io::Error::other(format!("{} is not CRIU's: {error}", path.display())))?;
    let aside = images.join("files.img.new");
    std::fs::write(&aside, changed)?;
    std::fs::rename(aside, path)
}

fn forgetful(image: &[u8], mounts: &BTreeSet<u32>) -> Result<Vec<u8>, FormatError> {
    let mut rest = image.strip_prefix(&MAGIC).ok_or(FormatError::Magic)?;
    let mut changed = MAGIC.to_vec();
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>().ok_or(FormatError::Length)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| FormatError::Length)?;
        let (entry, after) = after.split_at_checked(length).ok_or(FormatError::Length)?;
        put_entry(&mut changed, &forgetful_entry(entry, mounts)?)?;
        rest = after;
    }
    Ok(changed)
}

fn put_entry(image: &mut Vec<u8>, entry: &[u8]) -> Result<(), FormatError> {
    let length = u32::try_from(entry.len()).map_err(|_| FormatError::Length)?;
    image.extend_from_slice(&length.to_le_bytes());
    image.extend_from_slice(entry);
    Ok(())
}

fn forgetful_entry(entry: &[u8], mounts: &BTreeSet<u32>) -> Result<Vec<u8>, FormatError> {
    let mut changed = Vec::with_capacity(entry.len());
    for field in fields(entry)? {
        match field.number {
            FIELD_REG => {
                let mut inner = CodedInputStream::from_bytes(field.bytes);
                inner.read_raw_varint32()?;
                let file = forgetful_file(&inner.read_bytes()?, mounts)?;
                let mut output = protobuf::CodedOutputStream::vec(&mut changed);
                output.write_bytes(FIELD_REG, &file)?;
                output.flush()?;
            }
            _ => changed.extend_from_slice(field.bytes),
        }
    }
    Ok(changed)
}

fn forgetful_file(file: &[u8], mounts: &BTreeSet<u32>) -> Result<Vec<u8>, FormatError> {
    let fields = fields(file)?;
    let is_shared = fields.iter().any(|field| field.number == FIELD_MOUNT && field.mount().is_some_and(|mount| mounts.contains(&mount)));
    let stays = |field: &&Field<'_>| !is_shared || !matches!(field.number, FIELD_SIZE | FIELD_MODE);
    Ok(fields.iter().filter(stays).flat_map(|field| field.bytes).copied().collect())
}

/// A field with its tag, as it stands in the message.
#[derive(Debug)]
struct Field<'a> {
    number: u32,
    bytes: &'a [u8],
}

impl Field<'_> {
    /// Its value as a mount's number.
    fn mount(&self) -> Option<u32> {
        let mut input = CodedInputStream::from_bytes(self.bytes);
        input.read_raw_varint32().ok()?;
        u32::try_from(input.read_sint32().ok()?).ok()
    }
}

fn fields(message: &[u8]) -> Result<Vec<Field<'_>>, FormatError> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut fields = Vec::new();
    let at = |input: &CodedInputStream<'_>| usize::try_from(input.pos()).map_err(|_| FormatError::Length);
    loop {
        let start = at(&input)?;
        let Some(tag) = input.read_raw_tag_or_eof()? else { return Ok(fields) };
        let kind = WireType::new(tag & 7).ok_or(FormatError::Length)?;
        input.skip_field(kind)?;
        fields.push(Field { number: tag >> 3, bytes: &message[start..at(&input)?] });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::CodedOutputStream;

    fn message(write: impl FnOnce(&mut CodedOutputStream<'_>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut output = CodedOutputStream::vec(&mut bytes);
        write(&mut output);
        output.flush().unwrap();
        drop(output);
        bytes
    }

    /// An entry of an open file as CRIU writes it: type REG, id, `reg`.
    fn entry(mount: i32, size: Option<u64>) -> Vec<u8> {
        let reg = message(|output| {
            output.write_uint32(1, 5).unwrap();
            output.write_string(6, "/mnt/data/log").unwrap();
            output.write_sint32(FIELD_MOUNT, mount).unwrap();
            if let Some(size) = size {
                output.write_uint64(FIELD_SIZE, size).unwrap();
                output.write_uint32(FIELD_MODE, 0o100_644).unwrap();
            }
            output.write_uint32(11, 1234).unwrap();
        });
        message(|output| {
            output.write_enum(1, 1).unwrap();
            output.write_uint32(2, 5).unwrap();
            output.write_bytes(FIELD_REG, &reg).unwrap();
        })
    }

    fn image(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut image = MAGIC.to_vec();
        entries.iter().for_each(|entry| put_entry(&mut image, entry).unwrap());
        image
    }

    #[test]
    fn only_files_on_volumes_lose_their_size_and_mode() {
        let eventfd = message(|output| output.write_bytes(8, b"\x08\x01").unwrap());
        let before = image(&[entry(300, Some(10)), eventfd.clone(), entry(301, Some(20))]);
        let after = forgetful(&before, &BTreeSet::from([301])).unwrap();
        assert_eq!(after, image(&[entry(300, Some(10)), eventfd, entry(301, None)]));
        assert_eq!(forgetful(&before, &BTreeSet::new()).unwrap(), before);
    }

    #[test]
    fn a_cut_or_foreign_image_is_refused() {
        let whole = image(&[entry(1, Some(1))]);
        assert!(matches!(forgetful(&whole[..whole.len() - 1], &BTreeSet::new()), Err(FormatError::Length)));
        assert!(matches!(forgetful(b"something else", &BTreeSet::new()), Err(FormatError::Magic)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>) {
            let _ = forgetful(&image(std::slice::from_ref(&bytes)), &BTreeSet::from([1]));
            let _ = forgetful(&[&MAGIC[..], &bytes].concat(), &BTreeSet::from([1]));
        }
    }
}
