//! Where Debian's packages come from: the mirrors that this machine's apt is configured with, or those configured here.
//!
//! No mirror's name stands in this code: a machine behind a company's mirror must not ask elsewhere. Called by
//! bootstrap.rs; reads apt's configuration and changes nothing.

use super::TemplateConfig;
use super::recipe::Rootfs;
use std::fs;
use std::process::{Command, Stdio};

/// apt has no mirror of Debian proper: another distribution, or no apt at all.
#[derive(Debug, thiserror::Error)]
#[error(
    "this machine's apt is not configured with a Debian mirror, and the base template is made of Debian's packages; name \
     one (template.debian_mirror = \"http://…/debian\" or STILLBOX_TEMPLATE_DEBIAN_MIRROR), or start from an archive made \
     elsewhere (--template-archive FILE)"
)]
pub struct MirrorError;

/// The archives that a root file system is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mirrors {
    /// Debian proper.
    pub(super) main: String,
    /// Its security updates, where apt has a mirror of them.
    pub(super) security: Option<String>,
}

impl Mirrors {
    /// Lines for sources.list.
    pub(super) fn source_lines(&self, rootfs: &Rootfs) -> Vec<String> {
        let suite = &rootfs.suite;
        let components = rootfs.components.join(" ");
        let mut lines = vec![format!("deb {} {suite} {components}", self.main)];
        if rootfs.updates {
            lines.push(format!("deb {} {suite}-updates {components}", self.main));
            lines.extend(self.security.iter().map(|uri| format!("deb {uri} {suite}-security {components}")));
        }
        lines
    }
}

/// The configured mirrors, else apt's.
pub(super) fn find(config: &TemplateConfig) -> Result<Mirrors, MirrorError> {
    if let Some(main) = &config.debian_mirror {
        return Ok(Mirrors { main: main.clone(), security: config.debian_security_mirror.clone() });
    }
    let targets = output_of("apt-get", &["indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Created-By: Packages"]);
    let mut mirrors = choose(&targets, |path| fs::read_to_string(path).ok()).ok_or(MirrorError)?;
    if let Some(security) = &config.debian_security_mirror {
        mirrors.security = Some(security.clone());
    }
    Ok(mirrors)
}

/// Of apt's `label|uri` lines. Labels come from the archives' signed Release files; a machine that never ran
/// `apt-get update` has none yet, and then the path has to tell.
fn choose(targets: &str, read: impl Fn(&str) -> Option<String>) -> Option<Mirrors> {
    let targets: Vec<(&str, &str)> = targets.lines().filter_map(|line| line.split_once('|')).collect();
    let has_labels = targets.iter().any(|(label, _)| !label.is_empty());
    let find = |wanted: &str, path_end: &str| {
        let is_it = |(label, uri): &&(&str, &str)| match has_labels {
            true => *label == wanted,
            false => uri.trim_end_matches('/').ends_with(path_end),
        };
        let (_, uri) = targets.iter().find(is_it)?;
        Some(resolved(uri, &read)?.trim_end_matches('/').to_owned())
    };
    Some(Mirrors { main: find("Debian", "/debian")?, security: find("Debian-Security", "/debian-security") })
}

/// Debian's cloud images name a file that lists mirrors; a sandbox does not have that file, so its first line is used.
fn resolved(uri: &str, read: impl Fn(&str) -> Option<String>) -> Option<String> {
    let Some(path) = uri.strip_prefix("mirror+file:") else { return Some(uri.to_owned()) };
    let path = format!("/{}", path.trim_matches('/'));
    let list = read(&path)?;
    let first = list.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    first.split_whitespace().next().map(str::to_owned)
}

/// apt's own proxy settings, as variables: mmdebstrap gives the apt that it runs a configuration of its own.
pub(super) fn proxies() -> Vec<(&'static str, String)> {
    let found = output_of("apt-config", &["dump", "--format", "%f|%v%n", "Acquire::http::Proxy", "Acquire::https::Proxy"]);
    let value = |key: &str| {
        let value = found.lines().filter_map(|line| line.split_once('|')).find(|(name, _)| *name == key)?.1;
        Some(value.to_owned()).filter(|value| value.starts_with("http"))
    };
    [("http_proxy", value("Acquire::http::Proxy")), ("https_proxy", value("Acquire::https::Proxy"))]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
}

/// Nothing when the program is missing or fails: then apt has no say.
fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(targets: &str) -> Option<Mirrors> {
        choose(targets, |path| (path == "/etc/apt/mirrors/debian.list").then(|| "# ours\nhttp://inner.example/debian\n".to_owned()))
    }

    fn mirrors(main: &str, security: Option<&str>) -> Option<Mirrors> {
        Some(Mirrors { main: main.to_owned(), security: security.map(str::to_owned) })
    }

    #[test]
    fn the_archives_are_told_by_their_labels() {
        let targets = "Docker CE|https://d.example/linux/debian/\nDebian-Security|http://m.example/sec/\nDebian|http://m.example/deb/\n";
        assert_eq!(chosen(targets), mirrors("http://m.example/deb", Some("http://m.example/sec")));
    }

    #[test]
    fn before_the_first_update_the_paths_tell() {
        let targets = "|http://m.example/debian-security/\n|http://m.example/debian/\n";
        assert_eq!(chosen(targets), mirrors("http://m.example/debian", Some("http://m.example/debian-security")));
    }

    #[test]
    fn another_distribution_has_no_mirror() {
        assert_eq!(chosen("Ubuntu|http://m.example/ubuntu/\n"), None);
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn a_list_of_mirrors_gives_its_first() {
        assert_eq!(chosen("Debian|mirror+file:/etc/apt/mirrors/debian.list/\n"), mirrors("http://inner.example/debian", None));
    }
}
