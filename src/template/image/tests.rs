//! Images out of files and registries: Debian's docker-registry on a port of its own, and one that misbehaves.

mod fake;
mod real;

use super::*;
use crate::template::UnpackLimits;
use crate::template::layer;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// Configuration of a data folder that is nobody else's.
fn config(data_dir: &Path) -> TemplateConfig {
    TemplateConfig {
        data_dir: data_dir.to_owned(),
        archive: None,
        debian_mirror: None,
        debian_security_mirror: None,
        cache_dir: None,
        limits: UnpackLimits::default(),
        images: ImageSettings { pull_time_max: Duration::from_secs(60), ..ImageSettings::default() },
    }
}

fn request(reference: &str) -> ImageRequest {
    ImageRequest { reference: reference.to_owned(), credentials: None }
}

/// The outcome and what was told on the way.
fn resolved(config: &TemplateConfig, request: &ImageRequest) -> (Result<ImageBase, ImageError>, Vec<String>) {
    let said = Mutex::new(Vec::new());
    let progress = |line: &str| said.lock().unwrap().push(line.to_owned());
    let outcome = resolve_now(config, request, &progress, &AtomicBool::new(false));
    (outcome, said.into_inner().unwrap())
}

/// An error and all its causes in a line.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// A layer's tar with these files.
fn tar_of(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// A layer's tar with one file that is a hole, in GNU's form: a kilobyte for any size.
fn sparse_tar(path: &str, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    let octal = |field: &mut [u8], number: u64| field[..11].copy_from_slice(format!("{number:011o}").as_bytes());
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..path.len()].copy_from_slice(path.as_bytes());
    octal(&mut gnu.realsize, size);
    octal(&mut gnu.sparse[0].offset, size);
    octal(&mut gnu.sparse[0].numbytes, 0);
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(0);
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, io::empty()).unwrap();
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image's blobs by digest, and the manifest's.
struct TestImage {
    blobs: Vec<(Digest, Vec<u8>)>,
    manifest: Digest,
    manifest_size: usize,
}

impl TestImage {
    /// Of these layers, all but the first compressed.
    fn of(architecture: &str, layers: &[Vec<u8>]) -> Self {
        let mut blobs = Vec::new();
        let mut add = |bytes: Vec<u8>| {
            let (digest, size) = (Digest::of(&bytes), bytes.len());
            blobs.push((digest.clone(), bytes));
            (digest, size)
        };
        let diff_ids: Vec<String> = layers.iter().map(|tar| format!("sha256:{}", hex::encode(Sha256::digest(tar)))).collect();
        let described: Vec<serde_json::Value> = layers
            .iter()
            .enumerate()
            .map(|(position, tar)| {
                let kind = if position == 0 { "tar" } else { "tar+gzip" };
                let (digest, size) = add(if position == 0 { tar.clone() } else { gzip(tar) });
                serde_json::json!({ "mediaType": format!("application/vnd.oci.image.layer.v1.{kind}"), "digest": digest.as_str(), "size": size })
            })
            .collect();
        let configuration = serde_json::json!({
            "os": "linux", "architecture": architecture, "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "config": { "Env": ["PATH=/usr/bin", "EMPTY="], "User": "app:staff", "WorkingDir": "/srv", "Entrypoint": ["/e"], "Cmd": ["c"] },
        });
        let (config, config_size) = add(serde_json::to_vec(&configuration).unwrap());
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": described,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.as_str(), "size": config_size },
        });
        let (manifest, manifest_size) = add(serde_json::to_vec(&manifest).unwrap());
        Self { blobs, manifest, manifest_size }
    }

    fn blob(&self, digest: &str) -> Option<&[u8]> {
        self.blobs.iter().find(|(known, _)| known.as_str() == digest).map(|(_, bytes)| bytes.as_slice())
    }
}

/// Writes an OCI layout of these images, one per platform.
fn write_layout(folder: &Path, images: &[(&str, &TestImage)]) {
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    for (digest, bytes) in images.iter().flat_map(|(_, image)| &image.blobs) {
        fs::write(folder.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    }
    let described: Vec<serde_json::Value> = images
        .iter()
        .map(|(architecture, image)| {
            serde_json::json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.manifest.as_str(),
                "size": image.manifest_size, "platform": { "os": "linux", "architecture": architecture } })
        })
        .collect();
    let inner = serde_json::json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": described });
    let inner = serde_json::to_vec(&inner).unwrap();
    fs::write(folder.join("blobs/sha256").join(Digest::of(&inner).hex()), &inner).unwrap();
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{ "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": Digest::of(&inner).as_str(), "size": inner.len(),
        "annotations": { "org.opencontainers.image.ref.name": "team/app:v1" } }] });
    fs::write(folder.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Two layers, the second taking away a file of the first.
fn sample() -> TestImage {
    TestImage::of("amd64", &[tar_of(&[("etc/motd", "hello"), ("etc/gone", "x")]), tar_of(&[("etc/.wh.gone", ""), ("opt/app", "app")])])
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn layers_left(data_dir: &Path) -> usize {
    fs::read_dir(data_dir.join("layers")).map_or(0, Iterator::count)
}

#[track_caller]
fn assert_is_sample(config: &TemplateConfig, base: &ImageBase) {
    assert_eq!(base.env, BTreeMap::from([("PATH".into(), "/usr/bin".into()), ("EMPTY".into(), String::new())]));
    assert_eq!((base.user.as_str(), base.workdir.as_str()), ("app", "/srv"));
    assert_eq!((&*base.entrypoint, &*base.cmd), (&["/e".to_owned()][..], &["c".to_owned()][..]));
    let [lower, upper] = base.layers.as_slice() else { panic!("{:?}", base.layers) };
    let file = |layer: &str, path: &str| layer::folder_of(&config.data_dir, layer).join(path);
    assert_eq!(fs::read_to_string(file(lower, "etc/motd")).unwrap(), "hello");
    assert!(crate::template::whiteout::is_gone(&fs::symlink_metadata(file(upper, "etc/gone")).unwrap()));
}

#[test]
fn an_image_is_the_same_out_of_every_kind_of_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_layout(&at("layout"), &[("amd64", &sample()), ("arm64", &TestImage::of("arm64", &[tar_of(&[("x", "x")])]))]);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    run("tar", &["-C", &text(&at("layout")), "-cf", &text(&at("layout.tar")), "index.json", "oci-layout", "blobs"]);
    run("gzip", &["-k", &text(&at("layout.tar"))]);
    let source = format!("oci:{}:team/app:v1", text(&at("layout")));
    run("skopeo", &["copy", "-q", "--override-arch", "amd64", &source, &format!("docker-archive:{}:team/app:v1", text(&at("saved.tar")))]);
    let mut seen = Vec::new();
    for name in ["layout", "layout.tar", "layout.tar.gz", "saved.tar"] {
        let data_dir = tempfile::tempdir().unwrap();
        let mut config = config(data_dir.path());
        config.images.aliases.insert("team/app".to_owned(), Alias::Archive(at(name)));
        let (base, said) = resolved(&config, &request("team/app:v1"));
        let base = base.unwrap_or_else(|error| panic!("{name}: {}", told(&error)));
        assert_is_sample(&config, &base);
        assert!(said[0].contains("on this machine"), "{said:?}");
        seen.push(base.layers);
    }
    assert!(seen.iter().all(|layers| *layers == seen[0]), "{seen:?}");
}

#[test]
fn an_imported_image_answers_for_its_name_without_a_registry() {
    let folder = tempfile::tempdir().unwrap();
    write_layout(&folder.path().join("layout"), &[("amd64", &sample())]);
    let data_dir = tempfile::tempdir().unwrap();
    let config = config(data_dir.path());
    let reference = import(&config, &folder.path().join("layout"), None, &|_| {}).unwrap();
    assert_eq!(reference.familiar(), "team/app:v1");
    let (base, said) = resolved(&config, &request("team/app:v1"));
    assert_is_sample(&config, &base.unwrap());
    assert_eq!(said, [] as [String; 0], "nobody was asked");
}

#[test]
fn hostile_files_are_refused_by_the_name_of_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let data_dir = tempfile::tempdir().unwrap();
    let mut config = config(data_dir.path());
    config.limits.bytes_max = crate::model::ByteSize::mib(1);
    let refusal = |name: &str, layers: &[Vec<u8>]| {
        let layout = folder.path().join(name);
        write_layout(&layout, &[("amd64", &TestImage::of("amd64", layers))]);
        told(&import(&config, &layout, None, &|_| {}).unwrap_err())
    };
    assert!(refusal("out", &[tar_of(&[("../../etc/x", "x")])]).contains("'../../etc/x' is refused: its path has '..'"));
    let zeroes = "0".repeat(2 << 20);
    let bomb = refusal("bomb", &[tar_of(&[("small", "x")]), tar_of(&[("large", &zeroes)])]);
    assert!(bomb.contains("template.import_bytes_max"), "{bomb}");
    let together: Vec<Vec<u8>> = (0..3).map(|n| tar_of(&[(&format!("f{n}"), &zeroes[..600 << 10])])).collect();
    assert!(refusal("together", &together).contains("the image is larger than allowed"));
    let sparse: Vec<Vec<u8>> = (0..3).map(|n| sparse_tar(&format!("f{n}"), 600 << 10)).collect();
    let together = refusal("sparse", &sparse);
    assert!(together.contains("template.import_bytes_max"), "{together}");
    let other = refusal("arm", &[]);
    assert!(other.contains("no layers"), "{other}");
    let not_one = folder.path().join("text");
    fs::write(&not_one, "just text").unwrap();
    let text = told(&import(&config, &not_one, None, &|_| {}).unwrap_err());
    assert!(text.contains("neither an OCI layout nor a docker save archive"), "{text}");
    let incoming = fs::read_dir(data_dir.path().join("layers")).unwrap();
    assert_eq!(incoming.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("incoming")).count(), 0);
}

#[test]
fn a_changed_layer_is_told_from_the_one_that_was_named() {
    let folder = tempfile::tempdir().unwrap();
    let image = sample();
    write_layout(folder.path(), &[("amd64", &image)]);
    let (digest, bytes) = &image.blobs[0];
    let mut changed = bytes.clone();
    changed[512] ^= 1;
    fs::write(folder.path().join("blobs/sha256").join(digest.hex()), changed).unwrap();
    let data_dir = tempfile::tempdir().unwrap();
    let error = told(&import(&config(data_dir.path()), folder.path(), None, &|_| {}).unwrap_err());
    assert!(error.contains(&format!("should be {digest}")), "{error}");
    assert_eq!(layers_left(data_dir.path()), 0);
}

#[test]
fn aliases_are_found_by_every_spelling_and_for_every_tag() {
    let images = ImageSettings {
        aliases: BTreeMap::from([
            ("python".to_owned(), Alias::Template("base".to_owned())),
            ("docker.io/library/ubuntu:22.04".to_owned(), Alias::Archive("/u.tar".into())),
        ]),
        ..ImageSettings::default()
    };
    let found = |name: &str| images.alias_of(&name.parse().unwrap());
    assert!(matches!(found("python:3.12"), Some(Alias::Template(_))));
    assert!(matches!(found("docker.io/library/python:3.9"), Some(Alias::Template(_))));
    assert!(matches!(found("ubuntu:22.04"), Some(Alias::Archive(_))));
    assert!(found("ubuntu:24.04").is_none() && found("me/python").is_none());
    let data_dir = tempfile::tempdir().unwrap();
    let config = config(data_dir.path());
    assert_eq!(template_for(&config, &request("e2bdev/base")).as_deref(), Some("base"));
    let (outcome, _) = resolved(&config, &request("e2bdev/base:latest"));
    assert!(matches!(outcome, Err(ImageError::IsTemplate { .. })));
}
