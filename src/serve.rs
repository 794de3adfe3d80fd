//! The composition root: opens, recovers, spawns, drains.
//!
//! The order matters. What can fail because of somebody else (root, ports, the folder's lock) is tried before anything is
//! changed; requests are answered only when every sandbox of an earlier server was taken over.

use crate::config::{ApiKey, Config, Listen};
use crate::store::{Store, StoreError};
use std::fs;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why the server did not start. One line, with the next step.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Not root.
    #[error("namespaces, mounts and CRIU need root: run with sudo, or as a systemd service (config/stillbox.service)")]
    NotRoot,
    /// A port is taken.
    #[error("{address} is already in use; end the program that listens there, or set {key} to another port")]
    PortTaken {
        /// The address.
        address: SocketAddr,
        /// The setting.
        key: &'static str,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}; set {key} to an address of this machine")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The setting.
        key: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The data folder cannot be used.
    #[error("the data folder {path} cannot be used; set data_dir to a folder on ext4, xfs or btrfs")]
    DataDir {
        /// The folder or file in it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store cannot be opened; its message names the file and the holder of the lock.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Sockets bound before anything else happens.
#[derive(Debug)]
struct Bound {
    plain: Vec<TcpListener>,
    tls: Vec<TcpListener>,
}

impl Bound {
    fn bind(config: &Config) -> Result<Self, ServeError> {
        Ok(Self { plain: bind_all(&config.listen, "listen")?, tls: bind_all(&config.tls_listen, "tls_listen")? })
    }
}

/// All addresses of one setting. A machine without IPv6 goes without ::1 when 127.0.0.1 is there.
fn bind_all(listen: &Listen, key: &'static str) -> Result<Vec<TcpListener>, ServeError> {
    let mut bound = Vec::new();
    for &address in &listen.addresses {
        match TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(|source| ServeError::Listen { address, key, source })?;
                bound.push(listener);
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(ServeError::PortTaken { address, key }),
            Err(_) if address.ip().is_loopback() && address.is_ipv6() && !bound.is_empty() => {}
            Err(source) => return Err(ServeError::Listen { address, key, source }),
        }
    }
    Ok(bound)
}

/// Makes the data folder, readable by its owner only: dumps hold secrets.
fn make_data_dir(path: &Path) -> Result<(), ServeError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| ServeError::DataDir { path: path.to_owned(), source })
}

/// The configured key, else the one in the data folder, else a new one: `e2b_` and 40 hex digits, which the E2B SDKs'
/// own check accepts (contract/e2b.md 1.1).
fn api_key(config: &Config) -> Result<ApiKey, ServeError> {
    if let Some(key) = &config.api_key {
        return Ok(key.clone());
    }
    let path = config.data_dir.join("api_key");
    let failed = |source| ServeError::DataDir { path: path.clone(), source };
    match fs::read_to_string(&path) {
        Ok(text) => Ok(ApiKey(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = new_key();
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
            writeln!(file, "{key}").and_then(|()| file.sync_all()).map_err(failed)?;
            Ok(ApiKey(key))
        }
        Err(error) => Err(failed(error)),
    }
}

fn new_key() -> String {
    let mut bytes = [0u8; 20];
    getrandom::fill(&mut bytes).expect("the kernel's random generator always answers on Linux >= 5.19");
    format!("e2b_{}", hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_in_the_form_that_sdks_accept() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { data_dir: folder.path().to_owned(), ..Config::default() };
        let key = api_key(&config).unwrap();
        let digits = key.0.strip_prefix("e2b_").unwrap();
        assert!(digits.len() == 40 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
        assert_eq!(api_key(&config).unwrap(), key);
    }

    #[test]
    fn a_taken_port_is_named_with_its_setting() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = Listen { addresses: vec![taken.local_addr().unwrap()] };
        let error = bind_all(&listen, "listen").unwrap_err().to_string();
        assert!(error.contains("already in use") && error.contains("set listen"), "{error}");
    }
}
