//! How a path in a request becomes an absolute one. Shared by files, the filesystem service and working directories.

use std::path::{Component, Path, PathBuf};

use crate::users::User;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    #[error("path '{path}' contains a NUL byte")]
    Nul { path: String },
    #[error("cannot expand the home directory of another user in path '{path}'; use an absolute path")]
    OtherHome { path: String },
}

/// `""` is the default workdir, `~` and `~/x` are below the user's home, and so is a relative path; the result is
/// absolute, and nothing on disk has been looked at. Absolute paths stay as they were written, as in envd: their `..`
/// is the kernel's to resolve, and answers show the path that was asked for.
pub(crate) fn resolve(path: &str, user: &User, default_workdir: &str) -> Result<PathBuf, PathError> {
    if path.contains('\0') {
        return Err(PathError::Nul { path: path.replace('\0', "\\0") });
    }
    if path.is_empty() {
        return Ok(clean(&user.home.join(default_workdir)));
    }
    if path.starts_with('/') {
        return Ok(PathBuf::from(path));
    }
    let joined = match path.strip_prefix('~') {
        None => user.home.join(path),
        Some("") => user.home.clone(),
        Some(rest) if rest.starts_with('/') => user.home.join(rest.trim_start_matches('/')),
        Some(_) => return Err(PathError::OtherHome { path: path.to_owned() }),
    };
    Ok(clean(&joined))
}

/// Drops `.`, doubled slashes and `..` by the text alone, as Go's filepath.Clean does for envd.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(path: &str) -> Result<PathBuf, PathError> {
        let user = User { name: "user".into(), uid: 1000, gid: 1000, groups: vec![], home: "/home/user".into() };
        resolve(path, &user, "/code")
    }

    #[test]
    fn an_empty_path_is_the_workdir_and_a_relative_one_is_below_home() {
        assert_eq!(resolved("").unwrap(), Path::new("/code"));
        assert_eq!(resolved("a/b").unwrap(), Path::new("/home/user/a/b"));
        assert_eq!(resolved("/etc/hosts").unwrap(), Path::new("/etc/hosts"));
    }

    #[test]
    fn a_tilde_is_the_own_home_only() {
        assert_eq!(resolved("~").unwrap(), Path::new("/home/user"));
        assert_eq!(resolved("~/x").unwrap(), Path::new("/home/user/x"));
        assert_eq!(resolved("~//x").unwrap(), Path::new("/home/user/x"));
        assert_eq!(resolved("~root/x"), Err(PathError::OtherHome { path: "~root/x".into() }));
    }

    #[test]
    fn dots_of_a_relative_path_are_resolved_by_the_text_and_never_leave_the_root() {
        assert_eq!(resolved("./a/../b/.").unwrap(), Path::new("/home/user/b"));
        assert_eq!(resolved("../../../etc").unwrap(), Path::new("/etc"));
    }

    #[test]
    fn an_absolute_path_stays_as_it_was_written() {
        assert_eq!(resolved("/a/../b/").unwrap().to_str(), Some("/a/../b/"));
    }

    #[test]
    fn a_nul_byte_is_refused() {
        assert!(matches!(resolved("a\0b"), Err(PathError::Nul { .. })));
    }
}
