//! Users and groups from /etc/passwd and /etc/group, parsed here: see the crate's rule about NSS.
//!
//! The files are read at every question. They are small, and `useradd` inside the sandbox must count at once.

use std::fs;
use std::io;
use std::path::PathBuf;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Someone whom a process can run as, or a file can belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups, without the primary one.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("invalid username: '{name}'")]
    Unknown { name: String },
    #[error("could not read {path}")]
    Read {
        path: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The account called `name`, which is never taken for a number.
pub(crate) fn by_name(name: &str) -> Result<User, UserError> {
    let accounts = read(PASSWD)?;
    let memberships = read(GROUP)?;
    find_user(&accounts, &memberships, name).ok_or_else(|| UserError::Unknown { name: name.to_owned() })
}

/// Names of owners, for listings: both files are read once and asked many times.
#[derive(Debug, Default)]
pub(crate) struct Names {
    accounts: String,
    memberships: String,
}

impl Names {
    /// An unreadable file leaves its names unknown, which shows as numbers.
    pub(crate) fn read() -> Names {
        Names { accounts: read(PASSWD).unwrap_or_default(), memberships: read(GROUP).unwrap_or_default() }
    }

    /// The user's name, or the number itself for an unknown one.
    pub(crate) fn user(&self, uid: u32) -> String {
        name_of(&self.accounts, uid)
    }

    /// The group's name, or the number itself for an unknown one.
    pub(crate) fn group(&self, gid: u32) -> String {
        name_of(&self.memberships, gid)
    }
}

fn read(path: &'static str) -> Result<String, UserError> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        // An image without the file has no such users; that is not a failure of ours.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read { path, source }),
    }
}

/// passwd: name:password:uid:gid:gecos:home:shell
fn find_user(accounts: &str, memberships: &str, name: &str) -> Option<User> {
    let fields: Vec<&str> = accounts.lines().map(|line| line.split(':').collect()).find(|fields: &Vec<&str>| fields[0] == name)?;
    let uid = fields.get(2)?.parse().ok()?;
    let gid = fields.get(3)?.parse().ok()?;
    let home = fields.get(5).copied().filter(|home| home.starts_with('/')).unwrap_or("/");
    let groups = groups_of(memberships, name, gid);
    Some(User { name: name.to_owned(), uid, gid, groups, home: PathBuf::from(home) })
}

/// group: name:password:gid:member,member
fn groups_of(memberships: &str, name: &str, primary: u32) -> Vec<u32> {
    memberships
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':').skip(2);
            let gid: u32 = fields.next()?.parse().ok()?;
            let is_member = fields.next()?.split(',').any(|member| member == name);
            (is_member && gid != primary).then_some(gid)
        })
        .collect()
}

/// Both files carry the name first and the number third.
fn name_of(database: &str, id: u32) -> String {
    let named = database.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCOUNTS: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1000:,,,:/home/user:/bin/bash\n1000:x:7:7::/seven:/bin/sh\nhomeless:x:8:8:::\n";
    const MEMBERSHIPS: &str = "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:user\nbroken\ndocker:x:999:users\n";

    #[test]
    fn a_user_has_the_groups_that_list_it_besides_the_primary_one() {
        let user = find_user(ACCOUNTS, MEMBERSHIPS, "user").unwrap();
        assert_eq!(user, User { name: "user".into(), uid: 1000, gid: 1000, groups: vec![27], home: "/home/user".into() });
    }

    #[test]
    fn a_numeric_name_is_a_name() {
        assert_eq!(find_user(ACCOUNTS, MEMBERSHIPS, "1000").unwrap().uid, 7);
        assert_eq!(find_user(ACCOUNTS, MEMBERSHIPS, "0"), None);
    }

    #[test]
    fn a_user_without_a_home_lives_in_the_root() {
        assert_eq!(find_user(ACCOUNTS, MEMBERSHIPS, "homeless").unwrap().home, PathBuf::from("/"));
    }

    #[test]
    fn broken_lines_and_empty_names_find_nobody() {
        assert_eq!(find_user(ACCOUNTS, MEMBERSHIPS, "broken"), None);
        assert_eq!(find_user(ACCOUNTS, MEMBERSHIPS, ""), None);
        assert_eq!(find_user("", "", "user"), None);
    }

    #[test]
    fn unknown_owners_are_shown_as_numbers() {
        let names = Names { accounts: ACCOUNTS.into(), memberships: MEMBERSHIPS.into() };
        assert_eq!((names.user(1000), names.user(4711)), ("user".into(), "4711".into()));
        assert_eq!((names.group(27), names.group(4711)), ("sudo".into(), "4711".into()));
    }
}
