//! Finds the programs that travel inside the `stillbox` binary and writes the modules that embed them.
#![expect(clippy::disallowed_methods, reason = "cargo tells a build script everything by environment variables")]

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("embedded_criu.rs"), embedded_criu(&root)?)?;
    fs::write(out.join("embedded_agent.rs"), embedded_agent(&root)?)
}

/// The static agent: STILLBOX_AGENT_BIN, else built here. An empty STILLBOX_AGENT_BIN leaves it out, for builds that
/// start no sandbox.
///
/// A debug build takes the agent that is there, since a new one costs a minute of link-time optimisation, and says so
/// when that is older than its sources; a release build always brings it up to date.
fn embedded_agent(root: &Path) -> io::Result<String> {
    println!("cargo::rerun-if-env-changed=STILLBOX_AGENT_BIN");
    let file = match env::var_os("STILLBOX_AGENT_BIN") {
        Some(file) if file.is_empty() => return Ok("None".to_owned()),
        Some(file) => PathBuf::from(file),
        None => own_agent(root)?,
    };
    println!("cargo::rerun-if-changed={}", file.display());
    embed(&file)
}

fn own_agent(root: &Path) -> io::Result<PathBuf> {
    let inputs = ["agent/src", "agent/proto", "agent/build.rs", "agent/build.sh", "agent/Cargo.toml"].map(|input| root.join(input));
    for input in &inputs {
        println!("cargo::rerun-if-changed={}", input.display());
    }
    let triple = env::var("TARGET").map_err(io::Error::other)?;
    let target_dir = root.join("target/agent");
    let file = target_dir.join("stillbox-agent");
    let built_at = fs::metadata(&file).and_then(|metadata| metadata.modified()).ok();
    match built_at {
        Some(built_at) if env::var("PROFILE").is_ok_and(|profile| profile == "debug") => {
            if inputs.iter().any(|input| newest(input).is_some_and(|changed| changed > built_at)) {
                println!("cargo::warning=the embedded agent is older than its sources; rm {} to have it built anew", file.display());
            }
        }
        _ => {
            build_agent(root, &triple)?;
            keep(&target_dir.join(&triple).join("agent/stillbox-agent"), &file, inputs.iter().filter_map(|input| newest(input)).max())?;
        }
    }
    Ok(file)
}

/// Cargo runs this script again, and compiles everything after it, when a watched file is younger than the script's
/// start. What the script itself has made would be: a copy as old as its sources is embedded and watched instead.
fn keep(built: &Path, file: &Path, changed_at: Option<SystemTime>) -> io::Result<()> {
    if fs::read(file).ok() != Some(fs::read(built)?) {
        fs::copy(built, file)?;
    }
    match changed_at {
        Some(changed_at) => fs::OpenOptions::new().write(true).open(file)?.set_modified(changed_at),
        None => Ok(()),
    }
}

/// When the youngest file below `path` was changed.
fn newest(path: &Path) -> Option<SystemTime> {
    let metadata = fs::metadata(path).ok()?;
    let inside = fs::read_dir(path).into_iter().flatten().flatten().filter_map(|entry| newest(&entry.path()));
    inside.chain(metadata.modified().ok()).max()
}

fn build_agent(root: &Path, triple: &str) -> io::Result<()> {
    match Command::new(root.join("agent/build.sh")).arg(triple).status()?.success() {
        true => Ok(()),
        false => Err(io::Error::other("the agent does not build; its errors are above")),
    }
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
