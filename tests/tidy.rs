//! Holds the house's layout: which room may use which, where a library may be named, how long a file may be, that
//! docs/ARCHITECTURE.md names every room. Reads the sources as text; it keeps honest people honest.
//!
//! Each rule is a function from a file's path and text to findings, tested here on bad samples, then run over the tree.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Room, and the rooms it may use besides itself: the table of docs/ARCHITECTURE.md.
const MAY_USE: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("sys", &[]),
    ("hop", &[]),
    ("store", &["model"]),
    ("runtime", &["model", "sys", "hop"]),
    ("sandbox", &["model", "store", "runtime"]),
    ("template", &["model", "store", "runtime", "sandbox"]),
    ("volume", &["model", "sys", "store", "runtime", "sandbox"]),
    ("proxy", &["model", "sandbox", "hop"]),
    ("api", &["model", "sandbox", "template", "volume"]),
    // A room's own Config struct is all that it takes from any.
    ("config", &["model", "runtime", "sandbox", "template", "volume", "proxy", "api"]),
    // A client of the API; `serve`, `doctor`, `runtime` are handed over to, templates are files.
    ("cli", &["config", "model", "template", "serve", "doctor", "runtime"]),
    ("doctor", &["model", "config", "runtime", "template", "sandbox", "sys", "store"]),
    ("serve", &["model", "sys", "store", "runtime", "sandbox", "template", "volume", "proxy", "api", "config", "doctor"]),
    ("lib", &[]),
    ("main", &["cli"]),
];

/// Dialect, and the dialects it may use besides itself.
const DIALECTS: &[(&str, &[&str])] = &[("e2b", &[]), ("novita", &["e2b"]), ("hopx", &[])];

/// Path prefixes (a room, a file, a folder in it) where a name may stand in code.
struct Home {
    name: &'static str,
    homes: &'static [&'static str],
    /// What may not leave its home under another name either.
    stays: bool,
}

const HOMES: &[Home] = &[
    Home { name: "rusqlite::", homes: &["src/store/"], stays: true },
    Home { name: "axum::", homes: &["src/api/", "src/serve"], stays: false },
    Home { name: "libcontainer::", homes: &["src/runtime/helper/"], stays: true },
    Home { name: "rust_criu::", homes: &["src/runtime/helper/"], stays: true },
    // main.rs looks at its arguments, the helper changes its working directory; variables are config's (clippy.toml).
    Home { name: "std::env::", homes: &["src/config/", "src/main.rs", "src/runtime/rootfs.rs"], stays: false },
    Home { name: "libc::fork", homes: &[], stays: false },
    Home { name: "unistd::fork", homes: &["src/runtime/helper/"], stays: false },
    Home { name: "process::exit", homes: &[], stays: false },
];

/// Lines a file may have; those that may have more, up to what, and why one noun needs it.
const LINES_MAX: usize = 600;
const LONGER: &[(&str, usize, &str)] = &[];

/// Words that promise and do not deliver, or silence.
const UNFINISHED: &[&str] =
    &["todo!(", "unimplemented!(", "#[ignore", "dbg!(", ".unwrap()", ".unwrap_unchecked()", "|| panic!(", "|_| panic!("];

#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

// ---------------------------------------------------------------- reading Rust as text

/// The text with comments and the content of strings and characters blanked; lines stay where they are.
fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match (chars[at], chars.get(at + 1)) {
            ('/', Some('/')) => chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |length| at + length),
            ('/', Some('*')) => end_of_block_comment(&chars, at),
            ('r', Some('"' | '#')) if at == 0 || !is_word(chars[at - 1]) => end_of_raw_string(&chars, at).unwrap_or(at),
            ('"', _) => end_of_quoted(&chars, at, '"'),
            // A lifetime is no character: a character ends with its quote within a few steps.
            ('\'', _) if chars.get(at + 1) == Some(&'\\') || chars.get(at + 2) == Some(&'\'') => end_of_quoted(&chars, at, '\''),
            _ => at,
        };
        if end == at {
            code.push(chars[at]);
            at += 1;
        } else {
            code.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    code
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn end_of_raw_string(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let length = chars[open + 1..].windows(close.len()).position(|window| window == close);
    Some(length.map_or(chars.len(), |length| open + 1 + length + close.len()))
}

fn end_of_quoted(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// What runs in the product: everything before the file's test module, and nothing of a file of tests.
fn product_part<'a>(file: &str, code: &'a str) -> &'a str {
    let is_tests = file.split('/').any(|part| part == "tests" || part == "tests.rs");
    let end = if is_tests { Some(0) } else { code.find("#[cfg(test)]\nmod tests") };
    end.map_or(code, |end| &code[..end])
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// Where `name` stands as a path of its own, not as the end of another word.
fn mentions<'a>(code: &'a str, name: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(name).map(|(at, _)| at).filter(move |at| {
        let before = code[..*at].chars().next_back();
        let after = code[at + name.len()..].chars().next();
        let ends = name.ends_with(|c: char| !is_word(c)) || !after.is_some_and(is_word);
        !name.starts_with(is_word) || (!before.is_some_and(is_word) && ends)
    })
}

fn word_at(code: &str) -> &str {
    let end = code.find(|c: char| !is_word(c)).unwrap_or(code.len());
    &code[..end]
}

/// The first words of a path's continuation: one, or those of a `{…}` group's own level.
fn next_words(code: &str) -> Vec<&str> {
    let Some(group) = code.strip_prefix('{') else { return vec![word_at(code)] };
    let (mut words, mut depth, mut expects) = (Vec::new(), 0, true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expects = true,
            c if is_word(c) && expects => {
                words.push(word_at(&group[at..]));
                expects = false;
            }
            _ => {}
        }
    }
    words
}

// ---------------------------------------------------------------- rules

/// `src/api/e2b/routes.rs` is in room `api`, at depth 3.
fn room_of(file: &str) -> Option<(&str, usize)> {
    let inside = file.strip_prefix("src/")?.strip_suffix(".rs")?;
    let module = inside.strip_suffix("/mod").unwrap_or(inside);
    Some((module.split('/').next()?, module.split('/').count()))
}

fn rooms_left(file: &str, text: &str) -> Vec<Finding> {
    let Some((room, depth)) = room_of(file) else { return Vec::new() };
    let code = code_of(text);
    let code = product_part(file, &code);
    let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == room) else {
        return vec![Finding {
            file: file.into(),
            line: 1,
            what: format!("room '{room}' is not in the table of tests/tidy.rs and docs/ARCHITECTURE.md"),
        }];
    };
    // `crate::x` and as many `super::` as lead out of the room.
    let out = "super::".repeat(depth);
    let mut findings = Vec::new();
    for prefix in ["crate::", out.as_str()] {
        for at in mentions(code, prefix) {
            for word in next_words(&code[at + prefix.len()..]) {
                let is_room = MAY_USE.iter().any(|(name, _)| *name == word);
                if is_room && word != room && !allowed.contains(&word) {
                    findings.push(Finding { file: file.into(), line: line_of(code, at), what: format!("room {room} may not use {word}") });
                }
            }
        }
    }
    findings
}

fn dialects_mixed(file: &str, text: &str) -> Vec<Finding> {
    let inside = file.strip_prefix("src/api/").unwrap_or("");
    let own = inside.split(['/', '.']).next().unwrap_or("");
    let Some((_, allowed)) = DIALECTS.iter().find(|(name, _)| *name == own) else { return Vec::new() };
    let code = code_of(text);
    let mut findings = Vec::new();
    for (other, _) in DIALECTS.iter().filter(|(other, _)| *other != own && !allowed.contains(other)) {
        for at in mentions(&code, other).filter(|at| code[..*at].ends_with("::")) {
            findings.push(Finding { file: file.into(), line: line_of(&code, at), what: format!("dialect {own} may not use {other}") });
        }
    }
    findings
}

/// Outside its home a library is not named at all; inside it is not handed on.
fn names_away_from_home(file: &str, text: &str) -> Vec<Finding> {
    if !file.starts_with("src/") {
        return Vec::new();
    }
    let code = code_of(text);
    let product = product_part(file, &code);
    let mut findings = Vec::new();
    for home in HOMES {
        let is_home = home.homes.iter().any(|prefix| file.starts_with(prefix));
        // `use axum;` and `use axum as x;` have no path behind the name.
        let bare = home.name.trim_end_matches("::");
        let imports = mentions(product, bare).filter(|at| product[..*at].trim_end().ends_with("use"));
        for at in mentions(product, home.name).chain(imports) {
            let line = line_of(product, at);
            let statement = product[..at].rsplit([';', '{', '}']).next().unwrap_or("").trim();
            let is_handed_on = statement.starts_with("pub") && (statement.contains(" use") || statement.contains(" type "));
            if !is_home {
                let what =
                    format!("{bare} belongs to {}", if home.homes.is_empty() { "no room".to_owned() } else { home.homes.join(", ") });
                findings.push(Finding { file: file.into(), line, what });
            } else if home.stays && is_handed_on {
                findings.push(Finding { file: file.into(), line, what: format!("{bare} is handed on to other rooms") });
            }
        }
    }
    findings.dedup_by(|a, b| a.line == b.line && a.what == b.what);
    findings
}

fn unsafe_elsewhere(file: &str, text: &str) -> Vec<Finding> {
    let homes = ["src/sys/", "agent/src/sys"];
    if homes.iter().any(|home| file.starts_with(home)) {
        return Vec::new();
    }
    let code = code_of(text);
    let found = mentions(&code, "unsafe");
    found.map(|at| Finding { file: file.into(), line: line_of(&code, at), what: "unsafe code belongs to src/sys".into() }).collect()
}

fn agent_internals_used(file: &str, text: &str) -> Vec<Finding> {
    if !file.starts_with("src/") {
        return Vec::new();
    }
    let code = code_of(text);
    let mut findings = Vec::new();
    for at in mentions(&code, "stillbox_agent::") {
        if next_words(&code[at + "stillbox_agent::".len()..]).iter().any(|word| *word != "wire") {
            findings.push(Finding {
                file: file.into(),
                line: line_of(&code, at),
                what: "of the agent the host uses its wire types only".into(),
            });
        }
    }
    findings
}

fn unfinished(file: &str, text: &str) -> Vec<Finding> {
    let code = code_of(text);
    let product = product_part(file, &code);
    let mut findings = Vec::new();
    for word in UNFINISHED {
        // Tests may unwrap; nothing may be ignored or left to do.
        let is_for_tests_too = ["todo!(", "unimplemented!(", "#[ignore", "dbg!("].contains(word);
        let searched = if is_for_tests_too { code.as_str() } else { product };
        let found = searched.match_indices(word);
        findings.extend(found.map(|(at, _)| Finding {
            file: file.into(),
            line: line_of(searched, at),
            what: format!("{word} is not for this place"),
        }));
    }
    for marker in ["TODO", "FIXME", "XXX"] {
        let found = mentions(text, marker);
        findings.extend(found.map(|at| Finding {
            file: file.into(),
            line: line_of(text, at),
            what: format!("{marker}: do it, or say it in an issue"),
        }));
    }
    findings
}

fn warnings_silenced(file: &str, text: &str) -> Vec<Finding> {
    let code = code_of(text);
    let found = code.match_indices("#![allow(").filter(|_| !file.starts_with("src/sys/") && !file.starts_with("agent/src/sys"));
    found
        .map(|(at, _)| Finding {
            file: file.into(),
            line: line_of(&code, at),
            what: "a warning is silenced for a whole module; use #[expect(…, reason)] on the line".into(),
        })
        .collect()
}

fn head_missing(file: &str, text: &str) -> Vec<Finding> {
    if text.starts_with("//!") {
        return Vec::new();
    }
    vec![Finding { file: file.into(), line: 1, what: "a file opens with //! and says what lives here".into() }]
}

fn too_long(file: &str, text: &str) -> Vec<Finding> {
    let lines = text.lines().count();
    let (most, reason) = LONGER.iter().find(|(name, ..)| *name == file).map_or((LINES_MAX, ""), |(_, most, reason)| (*most, *reason));
    let problem = match lines {
        lines if lines > most => format!("{lines} lines, at most {most}: which noun wants a file of its own?"),
        lines if lines <= LINES_MAX && most > LINES_MAX => format!("{lines} lines: its exception ({reason}) is no longer needed"),
        _ => return Vec::new(),
    };
    vec![Finding { file: file.into(), line: lines, what: problem }]
}

/// Hosts of package registries and mirrors: those are the machine's business, not the repository's.
fn registry_hosts(file: &str, text: &str) -> Vec<Finding> {
    // Put together here, so that this file does not hold what it forbids.
    let hosts = [
        ["registry.npmjs", "org"],
        ["pypi", "org"],
        ["pythonhosted", "org"],
        ["static.crates", "io"],
        ["index.crates", "io"],
        ["debian", "org/debian"],
        ["archive.ubuntu", "com"],
        ["static.rust-lang", "org"],
    ];
    let mut findings = Vec::new();
    for host in hosts.map(|parts| parts.join(".")) {
        findings.extend(text.match_indices(&host).map(|(at, _)| Finding {
            file: file.into(),
            line: line_of(text, at),
            what: format!("{host}: registries and mirrors come from the machine's configuration"),
        }));
    }
    findings
}

// ---------------------------------------------------------------- the tree

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` whose names end in one of `endings`, but for build output and what git keeps to itself.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if !["target", ".git", "node_modules", ".venv", "dist"].contains(&name.as_str()) {
                found.extend(files(&path, endings));
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn check(endings: &[&str], folders: &[&str], rule: fn(&str, &str) -> Vec<Finding>) {
    let mut findings = Vec::new();
    let mut read = 0;
    for path in folders.iter().flat_map(|folder| files(&root().join(folder), endings)) {
        let name = path.strip_prefix(root()).expect("sources are below the root").to_string_lossy().into_owned();
        if let Ok(text) = fs::read_to_string(&path) {
            read += 1;
            findings.extend(rule(&name, &text));
        }
    }
    assert!(read > 0, "no files in {folders:?}");
    let shown: Vec<String> = findings.iter().map(Finding::to_string).collect();
    assert!(findings.is_empty(), "\n{}\n", shown.join("\n"));
}

const RUST: &[&str] = &[".rs"];
const SOURCES: &[&str] = &["src", "agent/src", "tests", "agent/tests"];

#[test]
fn rooms_use_only_the_rooms_of_their_table() {
    check(RUST, &["src"], rooms_left);
    check(RUST, &["src"], dialects_mixed);
}

#[test]
fn libraries_stay_in_their_homes() {
    check(RUST, &["src"], names_away_from_home);
    check(RUST, &["src"], agent_internals_used);
}

#[test]
fn unsafe_code_is_in_sys_only() {
    check(RUST, &["src", "agent/src"], unsafe_elsewhere);
}

#[test]
fn nothing_is_left_to_do_and_nothing_is_silenced() {
    let but_this = |file: &str, text: &str| if file == "tests/tidy.rs" { Vec::new() } else { unfinished(file, text) };
    check(RUST, SOURCES, but_this);
    check(RUST, &["src", "agent/src"], warnings_silenced);
}

#[test]
fn every_file_says_what_lives_in_it() {
    check(RUST, SOURCES, head_missing);
}

#[test]
fn files_hold_one_noun() {
    check(&[".rs", ".py", ".sh", ".mjs"], &["src", "agent/src", "agent/tests", "tests", "scripts", "templates", "criu"], too_long);
    for (file, _, reason) in LONGER {
        assert!(root().join(file).exists() && !reason.is_empty(), "{file} has an exception and does not exist, or has no reason");
    }
}

#[test]
fn no_registry_or_mirror_is_named() {
    let but_locks = |file: &str, text: &str| if file.ends_with("Cargo.lock") { Vec::new() } else { registry_hosts(file, text) };
    check(&[""], &["."], but_locks);
}

#[test]
fn the_map_names_every_room() {
    let map = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).expect("docs/ARCHITECTURE.md is the map");
    for (room, allowed) in MAY_USE.iter().filter(|(room, _)| !["lib", "main"].contains(room)) {
        let row = map
            .lines()
            .find(|line| line.starts_with('|') && (line.contains(&format!("`src/{room}`")) || line.contains(&format!("`src/{room}.rs`"))));
        assert!(row.is_some(), "docs/ARCHITECTURE.md has no row for src/{room}");
        let folder = root().join("src").join(room);
        assert!(folder.is_dir() || folder.with_extension("rs").is_file(), "room {room} of the table does not exist");
        assert!(
            allowed.iter().all(|other| MAY_USE.iter().any(|(name, _)| name == other)),
            "room {room} may use a room that is not in the table"
        );
    }
    for entry in fs::read_dir(root().join("src")).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned();
        assert!(MAY_USE.iter().any(|(room, _)| *room == name), "src/{name} is a room that the table does not know");
    }
}

// ---------------------------------------------------------------- the rules catch what they are for

fn whats(findings: Vec<Finding>) -> Vec<String> {
    findings.into_iter().map(|finding| format!("{} {}", finding.line, finding.what)).collect()
}

#[test]
fn a_room_that_leaves_its_table_is_found_however_it_is_written() {
    assert_eq!(whats(rooms_left("src/proxy/forward.rs", "//!\nuse crate::store::Store;")), ["2 room proxy may not use store"]);
    assert_eq!(
        whats(rooms_left("src/model/ids.rs", "use crate::{sys::mount, model::ByteSize, store};")),
        ["1 room model may not use sys", "1 room model may not use store"]
    );
    assert_eq!(whats(rooms_left("src/sandbox/create.rs", "fn f() { crate::api::run() }")), ["1 room sandbox may not use api"]);
    assert_eq!(whats(rooms_left("src/store/rows.rs", "use super::super::runtime::Runtime;")), ["1 room store may not use runtime"]);
    assert_eq!(whats(rooms_left("src/newroom.rs", "")), ["1 room 'newroom' is not in the table of tests/tidy.rs and docs/ARCHITECTURE.md"]);
    assert_eq!(
        whats(rooms_left("src/sandbox/create.rs", "// crate::api\nuse crate::model::SandboxId; const S: &str = \"crate::api\";")),
        [""; 0]
    );
    assert_eq!(whats(rooms_left("src/proxy/tests/world.rs", "use crate::store::Store;")), [""; 0], "tests may look behind the scenes");
    assert_eq!(whats(dialects_mixed("src/api/hopx/wire.rs", "use crate::api::e2b::wire::X;")), ["1 dialect hopx may not use e2b"]);
    assert_eq!(whats(dialects_mixed("src/api/novita/wire.rs", "use crate::api::e2b::wire::X;")), [""; 0]);
}

#[test]
fn a_library_away_from_home_is_found_and_so_is_a_re_export() {
    let found = |file: &str, text: &str| whats(names_away_from_home(file, text));
    assert_eq!(found("src/sandbox/x.rs", "fn f(c: &rusqlite::Connection) {}"), ["1 rusqlite belongs to src/store/"]);
    assert_eq!(found("src/sandbox/x.rs", "use axum as web;"), ["1 axum belongs to src/api/, src/serve"]);
    assert_eq!(
        found("src/runtime/bundle.rs", "use libcontainer::container::Container;"),
        ["1 libcontainer belongs to src/runtime/helper/"]
    );
    assert_eq!(found("src/store/mod.rs", "pub use rusqlite::Connection;"), ["1 rusqlite is handed on to other rooms"]);
    assert_eq!(found("src/store/mod.rs", "pub(crate) type C = rusqlite::Connection;"), ["1 rusqlite is handed on to other rooms"]);
    assert_eq!(
        found("src/runtime/helper/x.rs", "pub use rust_criu::rust_criu_protobuf::rpc;"),
        ["1 rust_criu is handed on to other rooms"]
    );
    assert_eq!(
        found("src/template/x.rs", "let home = std::env::var(\"HOME\");"),
        ["1 std::env belongs to src/config/, src/main.rs, src/runtime/rootfs.rs"]
    );
    assert_eq!(found("src/store/mod.rs", "pub struct Db<'a>(&'a rusqlite::Connection);"), [""; 0]);
    assert_eq!(found("src/template/x.rs", "fn f() {}\n#[cfg(test)]\nmod tests { fn t() { std::env::temp_dir(); } }"), [""; 0]);
}

#[test]
fn the_small_rules_catch_their_samples() {
    assert_eq!(whats(unsafe_elsewhere("src/runtime/x.rs", "fn f() {\n unsafe { g() }\n}")), ["2 unsafe code belongs to src/sys"]);
    assert_eq!(whats(unsafe_elsewhere("src/runtime/x.rs", "// unsafe\nlet unsafe_code = 1;")), [""; 0]);
    assert_eq!(
        whats(agent_internals_used("src/sandbox/agent.rs", "use stillbox_agent::{wire, users};")),
        ["1 of the agent the host uses its wire types only"]
    );
    assert_eq!(whats(unfinished("src/x.rs", "fn f() {\n  todo!()\n}")), ["2 todo!( is not for this place"]);
    assert_eq!(whats(unfinished("src/x.rs", "let x = y.unwrap();")), ["1 .unwrap() is not for this place"]);
    assert_eq!(whats(unfinished("src/x.rs", "// FIXME later")), ["1 FIXME: do it, or say it in an issue"]);
    assert_eq!(whats(unfinished("tests/x.rs", "#[ignore]\nfn t() { y.unwrap() }")), ["1 #[ignore is not for this place"]);
    assert_eq!(whats(warnings_silenced("src/x.rs", "//! x\n#![allow(dead_code)]")).len(), 1);
    assert_eq!(whats(head_missing("src/x.rs", "use std::fmt;")).len(), 1);
    assert_eq!(whats(too_long("src/x.rs", &"x\n".repeat(601))), ["601 601 lines, at most 600: which noun wants a file of its own?"]);
    let mirror = ["deb http://deb.debian", "org/debian trixie main"].join(".");
    assert_eq!(whats(registry_hosts("x.sh", &mirror)).len(), 1);
}

#[test]
fn comments_strings_and_characters_are_no_code() {
    let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" r#\"i \" j\"# 'k' '\\'' &'l m\nn";
    let code = code_of(text);
    let left: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    assert_eq!(left, "ae&'lmn");
    assert_eq!(code.lines().count(), text.lines().count());
}
