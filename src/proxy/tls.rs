//! Our own certificate authority below `data_dir/tls`, and the leaf that the HTTPS listener shows.
//!
//! The authority is made at the first start and renewed with the same key before it expires. Leaves live in memory
//! only and are made anew when half of their time is over. `stillbox env` hands clients a bundle that trusts the
//! system's authorities and ours.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData,
};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use time::{Duration, OffsetDateTime};

const AUTHORITY_LIFE: Duration = Duration::days(3650);
/// A year is left to every client that keeps an old bundle.
const AUTHORITY_RENEWAL: Duration = Duration::days(365);
/// Shorter than any client's upper bound for leaves (Apple's 825 days was the first of them).
const LEAF_LIFE: Duration = Duration::days(90);
/// Clocks of clients may be behind ours.
const BACKDATED: Duration = Duration::hours(24);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The folder or a file in it.
    #[error("could not read or write {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{path} holds no usable {what}; remove {folder} to make a new authority (clients must then load the new bundle)")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// `certificate` or `key`.
        what: &'static str,
        /// The folder of both.
        folder: PathBuf,
    },
    /// A certificate could not be made; the domain is no DNS name, most often.
    #[error("could not make a certificate for {names}")]
    Make {
        /// For whom.
        names: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// rustls did not take what we made.
    #[error("could not set up TLS")]
    Rustls(#[source] rustls::Error),
}

/// Our certificate authority.
#[derive(Debug)]
pub struct Authority {
    certificate: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
    path: PathBuf,
}

impl Authority {
    /// The authority in `data_dir/tls`, made if there is none. `instance` tells several servers' authorities apart in
    /// trust stores.
    pub fn open(data_dir: &Path, instance: &str) -> Result<Self, TlsError> {
        let folder = data_dir.join("tls");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|source| file_error(&folder, source))?;
        let key = open_key(&folder)?;
        let path = folder.join("ca.pem");
        let pem = match read_if_there(&path)? {
            Some(pem) if !needs_renewal(&path, &pem, &key)? => pem,
            Some(_) | None => {
                let pem = new_authority(instance, &key)?;
                replace(&path, 0o644, &pem)?;
                pem
            }
        };
        Self::of(path, pem, key)
    }

    fn of(path: PathBuf, pem: String, key: KeyPair) -> Result<Self, TlsError> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| damaged(&path, "certificate"))?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(|_| damaged(&path, "certificate"))?;
        Ok(Self { certificate, pem, issuer, path })
    }

    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Where its certificate is kept.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn leaf(&self, names: &[String]) -> Result<Leaf, TlsError> {
        let make = |source| TlsError::Make { names: names.join(", "), source };
        let key = KeyPair::generate().map_err(make)?;
        let mut params = CertificateParams::new(names.to_vec()).map_err(make)?;
        params.distinguished_name = named(names.first().map_or("stillbox", String::as_str));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - BACKDATED, now + LEAF_LIFE);
        let certificate = params.signed_by(&key, &self.issuer).map_err(make)?;
        let signer =
            rustls::crypto::ring::sign::any_ecdsa_type(&PrivatePkcs8KeyDer::from(key.serialize_der()).into()).map_err(TlsError::Rustls)?;
        let chain = vec![certificate.der().clone(), self.certificate.clone()];
        Ok(Leaf { key: Arc::new(CertifiedKey::new(chain, signer)), renew_at: now + LEAF_LIFE / 2 })
    }
}

/// The TLS side of the HTTPS listener for sandboxes below `domain`, which may carry a port. HTTP/1.1 only.
pub fn server_config(authority: &Arc<Authority>, domain: &str) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let names = leaf_names(super::Domain::of(domain).as_str());
    let own = Mutex::new(authority.leaf(&names)?);
    config_with(Arc::new(Leaves { own, names, clouds: Minted::by(authority) }), &[b"http/1.1"])
}

/// The TLS side that sandboxes meet where requests of theirs are changed on the way: a leaf for whatever name they ask
/// for. HTTP/2 and HTTP/1.1: some clients (gRPC's) speak nothing but the former.
pub fn interception_config(authority: &Arc<Authority>) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    config_with(Arc::new(AnyName(Minted::by(authority))), &[b"h2", b"http/1.1"])
}

fn config_with(leaves: Arc<dyn ResolvesServerCert>, protocols: &[&[u8]]) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(TlsError::Rustls)?;
    let mut config = versions.with_no_client_auth().with_cert_resolver(leaves);
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// Whom the leaf speaks for. A wildcard covers one label, so `api.<domain>` is in it; it is named for those who read it.
fn leaf_names(domain: &str) -> Vec<String> {
    let own = [domain.to_owned(), format!("*.{domain}"), format!("api.{domain}")];
    let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut seen = BTreeSet::new();
    own.into_iter().chain(local).filter(|name| seen.insert(name.clone())).collect()
}

/// Writes the system's authorities and ours to `to`, readable by everybody: what `SSL_CERT_FILE` and its like point to.
pub fn write_bundle(authority: &Authority, to: &Path) -> Result<(), TlsError> {
    replace(to, 0o644, &bundle(authority))
}

/// As many of the system's authorities as can be read, and ours last. A machine without any still trusts ours.
fn bundle(authority: &Authority) -> String {
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(error = error as &dyn std::error::Error, "Could not read all of the system's certificate authorities");
    }
    // After `eval "$(stillbox env)"` the "system's" authorities are our last bundle: ours must not pile up in it.
    let mut seen = BTreeSet::from([authority.certificate.to_vec()]);
    let others = system.certs.iter().filter(|certificate| seen.insert(certificate.to_vec()));
    others.map(|certificate| pem_of(certificate)).chain([authority.pem.clone()]).collect()
}

fn pem_of(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("base64 is ASCII")).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

#[derive(Debug)]
struct Leaf {
    key: Arc<CertifiedKey>,
    renew_at: OffsetDateTime,
}

/// The clouds whose SDKs this server speaks to. A client that cannot be told another name finds it under theirs, on a
/// machine that resolves them so (`stillbox hosts`) and trusts our authority: both are its owner's doing.
const CLOUDS: [&str; 4] = ["e2b.app", "e2b.dev", "novita.ai", "hopx.dev"];
/// Leaves that are kept; names come from whoever connects.
const MINTED_MAX: usize = 256;

/// Shows the leaf for our own names, and to who asks for a cloud's name one for that. Makes new ones in time.
#[derive(Debug)]
struct Leaves {
    names: Vec<String>,
    own: Mutex<Leaf>,
    clouds: Minted,
}

impl ResolvesServerCert for Leaves {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match hello.server_name().and_then(cloud_domain) {
            // A certificate's `*` stands for one label, so each domain below a cloud's has a leaf of its own.
            Some(domain) => self.clouds.leaf(domain, &[format!("*.{domain}"), domain.to_owned()]),
            None => self.own(),
        }
    }
}

impl Leaves {
    fn own(&self) -> Option<Arc<CertifiedKey>> {
        let mut leaf = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if leaf.renew_at <= OffsetDateTime::now_utc() {
            match self.clouds.authority.leaf(&self.names) {
                Ok(renewed) => *leaf = renewed,
                Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "Could not renew the TLS certificate"),
            }
        }
        Some(Arc::clone(&leaf.key))
    }
}

/// Shows a leaf for the very name that is asked for.
#[derive(Debug)]
struct AnyName(Minted);

impl ResolvesServerCert for AnyName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name()?;
        self.0.leaf(name, &[name.to_owned()])
    }
}

/// Leaves made when they are first asked for.
struct Minted {
    authority: Arc<Authority>,
    by_name: Mutex<BTreeMap<String, Leaf>>,
}

impl std::fmt::Debug for Minted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Minted").finish_non_exhaustive()
    }
}

impl Minted {
    fn by(authority: &Arc<Authority>) -> Self {
        Self { authority: Arc::clone(authority), by_name: Mutex::default() }
    }

    /// The leaf that is kept under `key`, else a new one for `names`.
    fn leaf(&self, key: &str, names: &[String]) -> Option<Arc<CertifiedKey>> {
        let mut leaves = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.get(key).filter(|leaf| leaf.renew_at > OffsetDateTime::now_utc()) {
            return Some(Arc::clone(&leaf.key));
        }
        if leaves.len() >= MINTED_MAX {
            leaves.clear();
        }
        match self.authority.leaf(names) {
            Ok(leaf) => {
                let made = Arc::clone(&leaf.key);
                leaves.insert(key.to_owned(), leaf);
                Some(made)
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "Could not make a TLS certificate for {key}");
                None
            }
        }
    }
}

/// What stands behind the first label of a cloud's name.
fn cloud_domain(name: &str) -> Option<&str> {
    let (_, domain) = name.split_once('.')?;
    CLOUDS.iter().any(|cloud| domain.strip_suffix(cloud).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))).then_some(domain)
}

fn new_authority(instance: &str, key: &KeyPair) -> Result<String, TlsError> {
    let make = |source| TlsError::Make { names: "the authority".to_owned(), source };
    let mut params = CertificateParams::new(Vec::new()).map_err(make)?;
    params.distinguished_name = named(&format!("Stillbox local authority {instance}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - BACKDATED, now + AUTHORITY_LIFE);
    Ok(params.self_signed(key).map_err(make)?.pem())
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Stillbox");
    // X.520 allows 64 characters; longer domains stand in the alternative names, where clients look.
    name.push(DnType::CommonName, common_name.chars().take(64).collect::<String>());
    name
}

fn needs_renewal(path: &Path, pem: &str, key: &KeyPair) -> Result<bool, TlsError> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| damaged(path, "certificate"))?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).map_err(|_| damaged(path, "certificate"))?;
    let is_ours = certificate.public_key().raw == key.subject_public_key_info();
    let ends = certificate.validity().not_after.to_datetime();
    Ok(!is_ours || ends < OffsetDateTime::now_utc() + AUTHORITY_RENEWAL)
}

fn open_key(folder: &Path) -> Result<KeyPair, TlsError> {
    let path = folder.join("ca.key");
    match read_if_there(&path)? {
        Some(pem) => KeyPair::from_pem(&pem).map_err(|_| damaged(&path, "key")),
        None => {
            let key = KeyPair::generate().map_err(|source| TlsError::Make { names: "the authority".to_owned(), source })?;
            replace(&path, 0o600, &key.serialize_pem())?;
            Ok(key)
        }
    }
}

fn damaged(path: &Path, what: &'static str) -> TlsError {
    TlsError::Damaged { path: path.to_owned(), what, folder: path.parent().unwrap_or(path).to_owned() }
}

fn file_error(path: &Path, source: io::Error) -> TlsError {
    TlsError::File { path: path.to_owned(), source }
}

fn read_if_there(path: &Path) -> Result<Option<String>, TlsError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(path, error)),
    }
}

/// Written aside, synced, renamed: a reader sees the old file or the new one.
fn replace(path: &Path, mode: u32, text: &str) -> Result<(), TlsError> {
    let aside = path.with_extension("new");
    let write = || -> io::Result<()> {
        // A file of an earlier, broken try may have another mode.
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().map_err(|source| file_error(path, source))
}
