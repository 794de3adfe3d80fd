//! CAs that the host gives the sandbox: appended to the image's own bundle, between two marks by which a later /init
//! finds them, and exported to programs that bring a bundle of their own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::write::write_in_place;

/// The given CAs alone. Node adds this file to its own list, and a full bundle there would cost every start of it.
pub(super) const CA_PATH: &str = "/run/stillbox/ca.pem";
/// Where distributions keep the bundle; Debian's is made when there is none.
const BUNDLES: [&str; 4] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"];
const BUNDLE_ENVS: [&str; 4] = ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO"];
const EXTRA_ENV: &str = "NODE_EXTRA_CA_CERTS";
const BEGIN: &str = "\n# stillbox: begin of the sandbox's own CAs\n";
const END: &str = "\n# stillbox: end of the sandbox's own CAs\n";

/// Makes the sandbox trust `pem`, or nothing of ours any more. Returns the variables that programs need for it.
pub(super) fn apply(pem: Option<&str>) -> io::Result<BTreeMap<String, String>> {
    let bundle = BUNDLES.into_iter().find(|path| Path::new(path).is_file()).unwrap_or(BUNDLES[0]);
    match pem {
        Some(pem) => {
            write_in_place(CA_PATH.as_ref(), pem.as_bytes())?;
            if !ends_with(bundle.as_ref(), &block(pem))? {
                let own = fs::read_to_string(bundle).or_else(absent_is_empty)?;
                let resolved = fs::canonicalize(bundle).unwrap_or_else(|_| bundle.into());
                write_in_place(&resolved, with_block(&own, Some(pem)).as_bytes())?;
            }
            // An image without CAs of its own has nothing to name to programs that bring theirs: they would trust us alone.
            let has_own = fs::metadata(bundle)?.len() > block(pem).len() as u64;
            let bundles = BUNDLE_ENVS.into_iter().filter(|_| has_own).map(|name| (name, bundle));
            Ok(bundles.chain([(EXTRA_ENV, CA_PATH)]).map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
        }
        None if ends_with(bundle.as_ref(), END)? => {
            write_in_place(&fs::canonicalize(bundle)?, with_block(&fs::read_to_string(bundle)?, None).as_bytes())?;
            Ok(BTreeMap::new())
        }
        None => Ok(BTreeMap::new()),
    }
}

fn absent_is_empty(error: io::Error) -> io::Result<String> {
    if error.kind() == io::ErrorKind::NotFound { Ok(String::new()) } else { Err(error) }
}

/// The bundle without a block of ours from before, and with the new one if there is one.
fn with_block(bundle: &str, pem: Option<&str>) -> String {
    let own = match (bundle.find(BEGIN), bundle.rfind(END)) {
        (Some(begin), Some(end)) if begin < end => [&bundle[..begin], &bundle[end + END.len()..]].concat(),
        _ => bundle.to_owned(),
    };
    match pem {
        Some(pem) => own + &block(pem),
        None => own,
    }
}

fn block(pem: &str) -> String {
    [BEGIN, pem.trim(), END].concat()
}

/// Reads the last bytes alone, since this is asked at every /init.
fn ends_with(path: &Path, end: &str) -> io::Result<bool> {
    let mut file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) => return absent_is_empty(error).map(|_| false),
    };
    let len = file.metadata()?.len();
    let Some(start) = len.checked_sub(end.len() as u64) else { return Ok(false) };
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::with_capacity(end.len());
    file.take(end.len() as u64).read_to_end(&mut tail)?;
    Ok(tail == end.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_appended_replaced_and_taken_out_again() {
        let once = with_block("IMAGE", Some("ONE\n"));
        assert!(once.starts_with("IMAGE\n# stillbox") && once.contains("\nONE\n") && once.ends_with(END));
        let twice = with_block(&once, Some("TWO"));
        assert_eq!(twice, with_block("IMAGE", Some("TWO")));
        assert_eq!(with_block(&twice, None), "IMAGE");
    }

    #[test]
    fn a_block_at_the_end_is_recognised() {
        let path = std::env::temp_dir().join(format!("stillbox-agent-trust-{}", std::process::id()));
        for (content, expected) in [(with_block("IMAGE", Some("ONE")), true), ("IMAGE".repeat(40), false), (String::new(), false)] {
            fs::write(&path, content).unwrap();
            assert_eq!(ends_with(&path, END).unwrap(), expected);
        }
        fs::remove_file(&path).unwrap();
        assert!(!ends_with(&path, END).unwrap());
    }
}
