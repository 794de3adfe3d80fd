//! A build's context: which files a COPY takes, their hash, and the archive that is uploaded.

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// A folder with what `.dockerignore` says of it.
#[derive(Debug)]
pub(super) struct Context {
    root: PathBuf,
    rules: Vec<Rule>,
}

/// A line of `.dockerignore`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    pattern: Vec<String>,
    /// `!`: takes back what earlier lines left out.
    takes_back: bool,
}

/// The files of one COPY, in order, by their paths in the context.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    paths: Vec<PathBuf>,
}

impl Context {
    /// `dockerfile` may have an ignore file of its own, `<name>.dockerignore`.
    pub(super) fn open(root: &Path, dockerfile: &Path) -> io::Result<Self> {
        let mut own = dockerfile.as_os_str().to_owned();
        own.push(".dockerignore");
        let mut text = String::new();
        for place in [PathBuf::from(own), root.join(".dockerignore")] {
            match fs::read_to_string(&place) {
                Ok(found) => {
                    text = found;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", place.display()))),
            }
        }
        Ok(Self { root: root.to_owned(), rules: text.lines().filter_map(Rule::parse).collect() })
    }

    /// What `source`, a path or pattern in the context, takes. An error says what is wrong with it.
    pub(super) fn files(&self, source: &str) -> Result<Files, String> {
        let pattern = components(source).ok_or_else(|| format!("'{source}' lies outside of the context {}", self.root.display()))?;
        let failed = |error: io::Error| format!("'{source}' cannot be read: {error}");
        let mut paths = Vec::new();
        self.find(Path::new(""), &pattern, &mut paths).map_err(failed)?;
        paths.sort();
        paths.dedup();
        match paths.is_empty() {
            true => Err(format!("'{source}' is not in the context {}, or .dockerignore leaves it out", self.root.display())),
            false => Ok(Files { root: self.root.clone(), paths }),
        }
    }

    fn find(&self, folder: &Path, pattern: &[String], found: &mut Vec<PathBuf>) -> io::Result<()> {
        let Some((first, rest)) = pattern.split_first() else { return self.take(folder, found) };
        for name in names_in(&self.root.join(folder))? {
            if !matches_name(first, &name) {
                continue;
            }
            let path = folder.join(&name);
            if rest.is_empty() {
                self.take(&path, found)?;
            } else if self.leads_inside(&path) && fs::metadata(self.root.join(&path))?.is_dir() {
                self.find(&path, rest, found)?;
            }
        }
        Ok(())
    }

    /// Whether a path, with the links in it, stays in the context: who made that is not to say which of our other files are
    /// sent to a build.
    fn leads_inside(&self, path: &Path) -> bool {
        let root = fs::canonicalize(&self.root);
        root.and_then(|root| Ok(fs::canonicalize(self.root.join(path))?.starts_with(root))).unwrap_or(false)
    }

    /// The path and everything below it that is not left out. Links are taken as links.
    fn take(&self, path: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
        let is_root = path.as_os_str().is_empty();
        let is_left_out = !is_root && self.leaves_out(path);
        let is_dir = fs::symlink_metadata(self.root.join(path))?.is_dir();
        if !is_left_out && !is_root {
            found.push(path.to_owned());
        }
        // A later rule may take back something in a folder that is left out.
        if is_dir && (!is_left_out || self.rules.iter().any(|rule| rule.takes_back)) {
            for name in names_in(&self.root.join(path))? {
                self.take(&path.join(name), found)?;
            }
        }
        Ok(())
    }

    fn leaves_out(&self, path: &Path) -> bool {
        let names: Vec<String> = path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        let matches = |rule: &&Rule| (1..=names.len()).any(|length| matches_path(&rule.pattern, &names[..length]));
        self.rules.iter().rev().find(matches).is_some_and(|rule| !rule.takes_back)
    }
}

impl Rule {
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        let (takes_back, pattern) = line.strip_prefix('!').map_or((false, line), |rest| (true, rest.trim()));
        Some(Self { pattern: components(pattern).filter(|pattern| !pattern.is_empty())?, takes_back })
    }
}

impl Files {
    /// Names the archive: of names, kinds, modes and contents, not of times.
    pub(super) fn hash(&self, source: &str, target: &str) -> io::Result<String> {
        let mut hasher = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        add(source.as_bytes());
        add(target.as_bytes());
        for path in &self.paths {
            let on_disk = self.root.join(path);
            let metadata = fs::symlink_metadata(&on_disk)?;
            add(path.as_os_str().as_bytes());
            add(&mode_of(&metadata).to_le_bytes());
            if metadata.is_symlink() {
                add(fs::read_link(&on_disk)?.as_os_str().as_bytes());
            } else if metadata.is_file() {
                add(&content_hash(&on_disk)?);
            }
        }
        Ok(hex::encode(hasher.finalize()))
    }

    /// Writes the tar.gz: owned by root, for the server gives them to whom the step says.
    pub(super) fn write_archive(&self, out: impl Write) -> io::Result<()> {
        let mut tar = tar::Builder::new(GzEncoder::new(out, Compression::fast()));
        tar.follow_symlinks(false);
        for path in &self.paths {
            let on_disk = self.root.join(path);
            let metadata = fs::symlink_metadata(&on_disk)?;
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&metadata);
            header.set_uid(0);
            header.set_gid(0);
            if metadata.is_symlink() {
                tar.append_link(&mut header, path, fs::read_link(&on_disk)?)?;
            } else if metadata.is_file() {
                tar.append_data(&mut header, path, fs::File::open(&on_disk)?)?;
            } else if metadata.is_dir() {
                tar.append_data(&mut header, path, io::empty())?;
            }
        }
        tar.into_inner()?.finish()?.flush()
    }
}

fn mode_of(metadata: &Metadata) -> u32 {
    metadata.permissions().mode()
}

fn content_hash(path: &Path) -> io::Result<Vec<u8>> {
    let mut hasher = Sha256::new();
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().to_vec()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// Names in a folder that are text; others cannot be named in a Dockerfile.
fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// A path's parts without `.`, or `None` for one that leads out. A leading slash means the context's root.
fn components(path: &str) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            Component::ParentDir => parts.pop().map(drop)?,
        }
    }
    Some(parts)
}

/// Whether the whole path is the pattern's; `**` stands for any number of folders.
fn matches_path(pattern: &[String], path: &[String]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "**" => {
            matches_path(rest, path) || path.split_first().is_some_and(|(_, path)| matches_path(pattern, path))
        }
        (Some((first, rest)), Some((name, path))) => matches_name(first, name) && matches_path(rest, path),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// `*`, `?`, `[a-z]` and `\x`, as Go's filepath.Match has them.
fn matches_name(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    matches_chars(&pattern, &name)
}

fn matches_chars(pattern: &[char], name: &[char]) -> bool {
    match pattern {
        [] => name.is_empty(),
        ['*', rest @ ..] => (0..=name.len()).any(|skipped| matches_chars(rest, &name[skipped..])),
        ['[', rest @ ..] if rest.contains(&']') => {
            let end = rest.iter().position(|c| *c == ']').unwrap_or(rest.len());
            name.split_first().is_some_and(|(c, after)| is_in(&rest[..end], *c) && matches_chars(&rest[end + 1..], after))
        }
        ['\\', literal, rest @ ..] => name.split_first().is_some_and(|(c, after)| c == literal && matches_chars(rest, after)),
        ['?', rest @ ..] => name.split_first().is_some_and(|(_, after)| matches_chars(rest, after)),
        [literal, rest @ ..] => name.split_first().is_some_and(|(c, after)| c == literal && matches_chars(rest, after)),
    }
}

fn is_in(class: &[char], c: char) -> bool {
    let (class, is_negated) = match class {
        ['^', rest @ ..] => (rest, true),
        _ => (class, false),
    };
    let mut at = 0;
    let mut is_found = false;
    while at < class.len() {
        if at + 2 < class.len() && class[at + 1] == '-' {
            is_found |= (class[at]..=class[at + 2]).contains(&c);
            at += 3;
        } else {
            is_found |= class[at] == c;
            at += 1;
        }
    }
    is_found != is_negated
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(files: &[&str], ignore: &str) -> (tempfile::TempDir, Context) {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        fs::write(folder.path().join(".dockerignore"), ignore).unwrap();
        let context = Context::open(folder.path(), &folder.path().join("Dockerfile")).unwrap();
        (folder, context)
    }

    fn taken(context: &Context, source: &str) -> Vec<String> {
        context.files(source).unwrap().paths.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn a_source_takes_files_folders_and_patterns() {
        let (_folder, context) = context(&["a.txt", "b.txt", "src/main.py", "src/deep/x"], "");
        assert_eq!(taken(&context, "a.txt"), ["a.txt"]);
        assert_eq!(taken(&context, "./src/"), ["src", "src/deep", "src/deep/x", "src/main.py"]);
        assert_eq!(taken(&context, "*.txt"), ["a.txt", "b.txt"]);
        assert_eq!(taken(&context, "/src/[lm]ai?.py"), ["src/main.py"]);
        assert_eq!(taken(&context, ".").len(), 7, "with .dockerignore itself");
        assert!(context.files("none").unwrap_err().contains("is not in the context"));
        assert!(context.files("../x").unwrap_err().contains("outside of the context"));
    }

    #[test]
    fn what_dockerignore_names_is_left_out_and_taken_back() {
        let ignore = "# comment\nnode_modules\n**/*.log\nbuild/*\n!build/keep\n.dockerignore\n";
        let files = ["node_modules/x/y", "a.log", "deep/er/b.log", "deep/c", "build/gone", "build/keep"];
        let (_folder, context) = context(&files, ignore);
        assert_eq!(taken(&context, "."), ["build", "build/keep", "deep", "deep/c", "deep/er"]);
    }

    #[test]
    fn the_hash_follows_contents_and_modes_and_not_times() {
        let (folder, context) = context(&["a", "b"], "");
        let hash = || context.files("a").unwrap().hash("a", "/a").unwrap();
        let first = hash();
        fs::File::open(folder.path().join("a")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(hash(), first);
        fs::set_permissions(folder.path().join("a"), fs::Permissions::from_mode(0o755)).unwrap();
        let executable = hash();
        assert_ne!(executable, first);
        fs::write(folder.path().join("a"), "other").unwrap();
        assert_ne!(hash(), executable);
    }

    #[test]
    fn a_link_in_the_way_leads_to_nothing_outside_of_the_context() {
        let (secrets, _) = context(&["id_rsa"], "");
        let (folder, context) = context(&["src/main.py"], "");
        std::os::unix::fs::symlink(secrets.path(), folder.path().join("away")).unwrap();
        std::os::unix::fs::symlink("src", folder.path().join("within")).unwrap();
        for source in ["away/id_rsa", "away/*", "*/id_rsa"] {
            assert!(context.files(source).unwrap_err().contains("is not in the context"), "{source}");
        }
        assert_eq!(taken(&context, "within/main.py"), ["within/main.py"]);
    }

    #[test]
    fn the_archive_holds_links_as_links() {
        let (folder, context) = context(&["d/file"], "");
        std::os::unix::fs::symlink("file", folder.path().join("d/link")).unwrap();
        let mut packed = Vec::new();
        context.files("d").unwrap().write_archive(&mut packed).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(packed.as_slice()));
        let kinds: Vec<_> = archive.entries().unwrap().map(|entry| entry.unwrap().header().entry_type()).collect();
        assert_eq!(kinds, [tar::EntryType::Directory, tar::EntryType::Regular, tar::EntryType::Symlink]);
    }
}
