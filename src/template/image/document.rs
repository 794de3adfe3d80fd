//! The JSON documents of an image: index, manifest, configuration; and which of an index's images is ours.
//!
//! Only the fields that are used. What they say is checked here: platform, number and kinds of layers.

use super::ImageProblem;
use super::reference::Digest;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Docker's own bound is 127; overlayfs takes 500, and a template's own steps come on top.
const LAYERS_MAX: usize = 256;
/// What sandboxes run on.
pub(super) const PLATFORM: (&str, &str) = ("linux", "amd64");
/// What a registry is asked for.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A reference from one document to another, or to a layer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Platform {
    pub(super) os: String,
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) variant: Option<String>,
}

/// One image: its configuration and its layers, bottom to top.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// What stands behind a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Document {
    /// The same image for several platforms.
    Index(Vec<Descriptor>),
    /// One image.
    Manifest(Manifest),
}

impl Document {
    /// Tells the two apart by what they have: media types are optional in OCI's and wrong in some registries' headers.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ImageProblem> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Either {
            #[serde(default)]
            schema_version: Option<u32>,
            manifests: Option<Vec<Descriptor>>,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
        }
        let either: Either = serde_json::from_slice(bytes).map_err(|source| ImageProblem::Document { what: "manifest", source })?;
        match either {
            Either { schema_version: Some(1), .. } => {
                Err(ImageProblem::Unsupported("its manifest has Docker's schema 1, which nobody makes any more; push it again".into()))
            }
            Either { manifests: Some(manifests), .. } => Ok(Self::Index(manifests)),
            Either { config: Some(config), layers: Some(layers), .. } => Ok(Self::Manifest(Manifest { config, layers })),
            _ => Err(ImageProblem::Unsupported("its manifest names neither layers nor images".into())),
        }
    }
}

/// Of an index, the image for [`PLATFORM`]; entries that name no platform come last.
pub(super) fn choose(manifests: &[Descriptor]) -> Result<&Descriptor, ImageProblem> {
    let is_ours = |platform: &Platform| (platform.os.as_str(), platform.architecture.as_str()) == PLATFORM;
    let rank = |descriptor: &Descriptor| match &descriptor.platform {
        Some(platform) if is_ours(platform) && platform.variant.as_deref().is_none_or(|variant| variant == "v1") => Some(0),
        // Built for newer CPUs, which this machine may be or not.
        Some(platform) if is_ours(platform) => Some(1),
        Some(_) => None,
        None => Some(2),
    };
    let ranked = manifests.iter().filter_map(|descriptor| Some((rank(descriptor)?, descriptor)));
    match ranked.min_by_key(|(rank, _)| *rank) {
        Some((_, descriptor)) => Ok(descriptor),
        None => {
            let mut platforms: Vec<String> =
                manifests.iter().filter_map(|m| m.platform.as_ref()).map(|p| format!("{}/{}", p.os, p.architecture)).collect();
            platforms.sort();
            platforms.dedup();
            Err(ImageProblem::Unsupported(format!(
                "it is made for {}, and sandboxes are {}/{}",
                platforms.join(", "),
                PLATFORM.0,
                PLATFORM.1
            )))
        }
    }
}

/// The part of an image's configuration that means something here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Configuration {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    pub(super) config: Option<Defaults>,
    #[serde(default)]
    rootfs: Rootfs,
}

/// What containers of the image start with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Defaults {
    pub(super) env: Option<Vec<String>>,
    pub(super) user: Option<String>,
    pub(super) working_dir: Option<String>,
    pub(super) entrypoint: Option<Vec<String>>,
    pub(super) cmd: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct Rootfs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

impl Configuration {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ImageProblem> {
        serde_json::from_slice(bytes).map_err(|source| ImageProblem::Document { what: "configuration", source })
    }

    /// The digests of the layers' tars, one per layer of the manifest, when all of it can run here.
    pub(super) fn layers(&self, count: usize) -> Result<&[Digest], ImageProblem> {
        if (self.os.as_str(), self.architecture.as_str()) != PLATFORM {
            let (os, architecture) = (&self.os, &self.architecture);
            return Err(ImageProblem::Unsupported(format!(
                "it is made for {os}/{architecture}, and sandboxes are {}/{}",
                PLATFORM.0, PLATFORM.1
            )));
        }
        let diff_ids = &self.rootfs.diff_ids;
        match diff_ids.len() {
            0 => Err(ImageProblem::Unsupported("it has no layers".into())),
            n if n != count => Err(ImageProblem::Unsupported(format!("its manifest has {count} layers, its configuration {n}"))),
            n if n > LAYERS_MAX => Err(ImageProblem::Unsupported(format!("it has {n} layers; {LAYERS_MAX} are the most"))),
            _ => Ok(diff_ids),
        }
    }
}

/// Whether a layer is one that registries hold and everybody can read.
pub(super) fn check_layer(descriptor: &Descriptor) -> Result<(), ImageProblem> {
    let kind = &descriptor.media_type;
    if kind.contains("encrypted") {
        return Err(ImageProblem::Unsupported(format!("layer {} is encrypted", descriptor.digest)));
    }
    if !(kind.is_empty() || kind.contains(".layer.") || kind.contains("rootfs.diff") || kind.contains("rootfs.foreign")) {
        return Err(ImageProblem::Unsupported(format!("{} is of type {kind}, which is no layer of a file system", descriptor.digest)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(letter: char) -> String {
        format!("sha256:{}", letter.to_string().repeat(64))
    }

    fn index(platforms: &[(&str, &str, Option<&str>)]) -> Vec<Descriptor> {
        let letters = 'a'..='f';
        let described = platforms.iter().zip(letters).map(|((os, architecture, variant), letter)| Descriptor {
            media_type: String::new(),
            digest: digest(letter).try_into().unwrap(),
            size: 1,
            platform: Some(Platform { os: (*os).into(), architecture: (*architecture).into(), variant: variant.map(Into::into) }),
            annotations: BTreeMap::new(),
        });
        described.collect()
    }

    #[test]
    fn the_image_for_this_platform_is_chosen() {
        let many = index(&[
            ("linux", "arm64", Some("v8")),
            ("linux", "amd64", Some("v3")),
            ("linux", "amd64", None),
            ("unknown", "unknown", None),
        ]);
        assert_eq!(choose(&many).unwrap().digest.as_str(), digest('c'));
        let newer_only = index(&[("linux", "arm64", None), ("linux", "amd64", Some("v2"))]);
        assert_eq!(choose(&newer_only).unwrap().digest.as_str(), digest('b'));
        let other = index(&[("linux", "arm64", None), ("windows", "amd64", None)]);
        assert_eq!(choose(&other).unwrap_err().to_string(), "it is made for linux/arm64, windows/amd64, and sandboxes are linux/amd64");
    }

    #[test]
    fn documents_are_told_apart_by_what_they_have() {
        let descriptor = format!(r#"{{"digest":"{}","size":3}}"#, digest('a'));
        let manifest = format!(r#"{{"schemaVersion":2,"config":{descriptor},"layers":[{descriptor}]}}"#);
        assert!(matches!(Document::parse(manifest.as_bytes()).unwrap(), Document::Manifest(_)));
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{descriptor}]}}"#);
        assert!(matches!(Document::parse(index.as_bytes()).unwrap(), Document::Index(_)));
        let old = Document::parse(br#"{"schemaVersion":1,"fsLayers":[]}"#).unwrap_err().to_string();
        assert!(old.contains("schema 1"), "{old}");
        let short = manifest.replace(&digest('a'), "sha256:../../etc");
        assert!(Document::parse(short.as_bytes()).is_err());
    }

    #[test]
    fn an_image_of_another_platform_or_with_other_layers_is_refused() {
        let parse = |text: String| Configuration::parse(text.as_bytes()).unwrap();
        let good = format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["{}"]}}}}"#, digest('a'));
        assert_eq!(parse(good.clone()).layers(1).unwrap().len(), 1);
        assert!(parse(good.clone()).layers(2).unwrap_err().to_string().contains("2 layers, its configuration 1"));
        assert!(parse(good.replace("amd64", "arm64")).layers(1).unwrap_err().to_string().contains("linux/arm64"));
        assert!(parse(good.replace(&format!(r#""{}""#, digest('a')), "")).layers(0).unwrap_err().to_string().contains("no layers"));
    }
}
