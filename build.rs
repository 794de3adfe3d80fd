//! Finds the programs that travel inside the `stillbox` binary and writes the modules that embed them.

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("embedded_criu.rs"), embedded_criu(&root)?)
}

/// The static CRIU: STILLBOX_CRIU_BIN, else what `make criu` made. Without either the binary is built all the same
/// and wants an installed one.
fn embedded_criu(root: &Path) -> io::Result<String> {
    println!("cargo::rerun-if-env-changed=STILLBOX_CRIU_BIN");
    let made = root.join("target/criu");
    // Cargo can only watch for a file to appear in a folder that exists.
    fs::create_dir_all(&made)?;
    println!("cargo::rerun-if-changed={}", made.display());
    let named = env::var_os("STILLBOX_CRIU_BIN").map(PathBuf::from);
    let Some(file) = named.or_else(|| Some(made.join("criu")).filter(|file| file.is_file())) else {
        return Ok("None".to_owned());
    };
    println!("cargo::rerun-if-changed={}", file.display());
    embed(&file)
}

/// An expression for `Option<Embedded>`: the file's bytes and their hash.
fn embed(file: &Path) -> io::Result<String> {
    let bytes = fs::read(file).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.display())))?;
    let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("Some(Embedded {{ bytes: include_bytes!({file:?}), sha256: {sha256:?} }})"))
}
