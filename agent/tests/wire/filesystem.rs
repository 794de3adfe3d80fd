//! The Filesystem service and its watches, as Connect clients see them.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::Stream;
use crate::support::{Agent, wait_for};

/// `NAME kind` for each event.
fn brief(events: &Value) -> Vec<String> {
    let events = events.as_array().map(Vec::as_slice).unwrap_or_default();
    events.iter().map(brief_one).collect()
}

fn brief_one(event: &Value) -> String {
    let kind = event["type"].as_str().unwrap().trim_start_matches("EVENT_TYPE_");
    format!("{kind} {}", event["name"].as_str().unwrap())
}

fn create_watcher(agent: &Agent, request: Value) -> Value {
    let watcher = agent.ok("filesystem.Filesystem/CreateWatcher", &request);
    json!({ "watcherId": watcher["watcherId"] })
}

fn polled(agent: &Agent, watcher: &Value) -> Vec<String> {
    brief(&agent.ok("filesystem.Filesystem/GetWatcherEvents", watcher)["events"])
}

fn code(agent: &Agent, method: &str, request: Value) -> (u16, String) {
    let answer = agent.call(&format!("filesystem.Filesystem/{method}"), &request);
    (answer.status, answer.code())
}

fn is(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

#[test]
fn an_entry_shows_everything_about_a_file() {
    let agent = Agent::start();
    agent.put("f.txt", "1234");
    let mut entry = agent.ok("filesystem.Filesystem/Stat", &json!({ "path": "f.txt" }))["entry"].clone();
    let modified = entry.as_object_mut().unwrap().remove("modifiedTime").unwrap();
    assert!(modified.as_str().unwrap().ends_with('Z'), "{modified}");
    assert_eq!(
        entry,
        json!({
            "name": "f.txt", "type": "FILE_TYPE_FILE", "path": "/home/user/f.txt", "size": "4", "mode": 0o644,
            "permissions": "-rw-r--r--", "owner": "user", "group": "user",
        })
    );
}

#[test]
fn a_link_shows_its_final_target() {
    let agent = Agent::start();
    agent.ok("filesystem.Filesystem/MakeDir", &json!({ "path": "d" }));
    let home = agent.outside("/home/user");
    symlink("d", home.join("first")).unwrap();
    symlink("first", home.join("second")).unwrap();
    symlink("nowhere", home.join("broken")).unwrap();
    let stat = |path: &str| agent.ok("filesystem.Filesystem/Stat", &json!({ "path": path }))["entry"].clone();
    let second = stat("second");
    assert_eq!(second["type"], "FILE_TYPE_DIRECTORY");
    assert_eq!((&second["symlinkTarget"], &second["isSymlink"]), (&json!("/home/user/d"), &json!(true)));
    assert_eq!((&second["permissions"], &second["mode"]), (&json!("Lrwxrwxrwx"), &json!(0o755)));
    let broken = stat("broken");
    assert_eq!((&broken["type"], &broken["symlinkTarget"]), (&Value::Null, &json!("/home/user/broken")));
}

#[test]
fn directories_are_listed_in_order_and_to_the_depth_asked_for() {
    let agent = Agent::start();
    for path in ["t/b", "t/a/x"] {
        agent.ok("filesystem.Filesystem/MakeDir", &json!({ "path": path }));
    }
    agent.put("t/a.txt", "");
    symlink("t", agent.outside("/home/user/link")).unwrap();
    let list = |path: &str, depth: u32| -> Vec<String> {
        let answer = agent.ok("filesystem.Filesystem/ListDir", &json!({ "path": path, "depth": depth }));
        let entries = answer["entries"].as_array().unwrap();
        entries.iter().map(|entry| entry["path"].as_str().unwrap().trim_start_matches("/home/user/").to_owned()).collect()
    };
    assert_eq!(list("t", 0), ["t/a", "t/a.txt", "t/b"]);
    assert_eq!(list("t", 2), ["t/a", "t/a/x", "t/a.txt", "t/b"]);
    assert_eq!(list("link", 1), ["link/a", "link/a.txt", "link/b"]);
    assert_eq!(agent.ok("filesystem.Filesystem/ListDir", &json!({ "path": "t/b" })), json!({}));
}

#[test]
fn errors_have_the_codes_that_the_sdks_look_for() {
    let agent = Agent::start();
    agent.put("f", "");
    agent.ok("filesystem.Filesystem/MakeDir", &json!({ "path": "d" }));
    let not_found = is(404, "not_found");
    let invalid = is(400, "invalid_argument");
    for (method, request, expected) in [
        ("Stat", json!({ "path": "x" }), &not_found),
        ("Stat", json!({ "path": "f/x" }), &not_found),
        ("Stat", json!({ "path": "~other/x" }), &invalid),
        ("Stat", json!({ "path": "x".repeat(300) }), &invalid),
        ("Stat", json!({ "path": "/x".repeat(3000) }), &invalid),
        ("Stat", json!({ "path": "a\0b" }), &invalid),
        ("ListDir", json!({ "path": "x" }), &not_found),
        ("ListDir", json!({ "path": "f" }), &invalid),
        ("MakeDir", json!({ "path": "d" }), &is(409, "already_exists")),
        ("MakeDir", json!({ "path": "f" }), &invalid),
        ("MakeDir", json!({ "path": "f/x" }), &invalid),
        ("Move", json!({ "source": "x", "destination": "y" }), &not_found),
        ("Move", json!({ "source": "f", "destination": "d" }), &invalid),
        ("CreateWatcher", json!({ "path": "x" }), &not_found),
        ("CreateWatcher", json!({ "path": "f" }), &invalid),
        ("GetWatcherEvents", json!({ "watcherId": "w0" }), &not_found),
        ("RemoveWatcher", json!({ "watcherId": "w0" }), &not_found),
    ] {
        assert_eq!(code(&agent, method, request.clone()), *expected, "{method} {request}");
    }
    // `nobody:`, who is not in this sandbox's /etc/passwd.
    let unknown =
        agent.rpc("filesystem.Filesystem/Stat").header("Content-Type", "application/json").header("Authorization", "Basic bm9ib2R5Og==");
    let answer = unknown.send("{}").json();
    assert_eq!(answer, json!({ "code": "unauthenticated", "message": "invalid username: 'nobody'" }));
}

#[test]
fn moving_makes_parents_and_overwrites() {
    let agent = Agent::start();
    agent.put("a", "new");
    agent.put("d/b", "old");
    let moved = agent.ok("filesystem.Filesystem/Move", &json!({ "source": "a", "destination": "d/b" }));
    assert_eq!(moved["entry"]["path"], "/home/user/d/b");
    assert_eq!(agent.get("/files?path=d/b").text(), "new");
    agent.ok("filesystem.Filesystem/Move", &json!({ "source": "d", "destination": "x/y/d" }));
    assert_eq!(fs::metadata(agent.outside("/home/user/x/y")).unwrap().uid(), 1000);
    let elsewhere = agent.ok("filesystem.Filesystem/Move", &json!({ "source": "x/y/d", "destination": "/home/full/d" }));
    assert_eq!(elsewhere["entry"]["type"], "FILE_TYPE_DIRECTORY", "to another file system");
    assert_eq!(agent.get("/files?path=/home/full/d/b").text(), "new");
    assert_eq!(code(&agent, "Stat", json!({ "path": "x/y/d" })), is(404, "not_found"));
}

#[test]
fn removing_is_recursive_and_may_be_repeated() {
    let agent = Agent::start();
    agent.put("d/e/f", "");
    for _ in 0..2 {
        assert_eq!(agent.ok("filesystem.Filesystem/Remove", &json!({ "path": "d" })), json!({}));
    }
    assert!(!agent.outside("/home/user/d").exists());
}

#[test]
fn an_upload_into_a_watched_directory_is_exactly_three_events() {
    let agent = Agent::start();
    let watcher = create_watcher(&agent, json!({ "path": "" }));
    agent.put("f", "content");
    assert_eq!(polled(&agent, &watcher), ["CREATE f", "CHMOD f", "WRITE f"]);
    agent.put("f", "again");
    assert_eq!(polled(&agent, &watcher), ["CHMOD f", "WRITE f"]);
    agent.ok("filesystem.Filesystem/Move", &json!({ "source": "f", "destination": "g" }));
    agent.ok("filesystem.Filesystem/Remove", &json!({ "path": "g" }));
    assert_eq!(polled(&agent, &watcher), ["RENAME f", "CREATE g", "REMOVE g"]);
    assert_eq!(polled(&agent, &watcher), Vec::<String>::new(), "events are handed out once");
}

#[test]
fn a_recursive_watch_sees_what_is_made_in_new_directories() {
    let agent = Agent::start();
    let watcher = create_watcher(&agent, json!({ "path": "", "recursive": true }));
    agent.ok("filesystem.Filesystem/MakeDir", &json!({ "path": "d" }));
    agent.put("d/f", "content");
    let events = polled(&agent, &watcher);
    assert_eq!(events.last_chunk(), Some(&["CREATE d/f", "CHMOD d/f", "WRITE d/f"].map(str::to_owned)));
    assert_eq!(events[0], "CREATE d");
    agent.put("a/b/c/f", "content");
    let events = polled(&agent, &watcher);
    assert_eq!(events.last_chunk(), Some(&["CREATE a/b/c/f", "CHMOD a/b/c/f", "WRITE a/b/c/f"].map(str::to_owned)));
    for path in ["a", "a/b", "a/b/c"] {
        let creations = events.iter().filter(|event| **event == format!("CREATE {path}")).count();
        assert_eq!(creations, 1, "{path} in {events:?}");
    }
}

#[test]
fn what_others_make_in_new_directories_is_seen_as_well() {
    let agent = Agent::start();
    let watcher = create_watcher(&agent, json!({ "path": "", "recursive": true }));
    let home = agent.outside("/home/user");
    fs::create_dir_all(home.join("x/y")).unwrap();
    fs::write(home.join("x/y/f"), "content").unwrap();
    let mut events = polled(&agent, &watcher);
    events.retain(|event| event.starts_with("CREATE"));
    assert_eq!(events, ["CREATE x", "CREATE x/y", "CREATE x/y/f"]);
}

#[test]
fn entries_come_with_events_that_leave_something() {
    let agent = Agent::start();
    let watcher = create_watcher(&agent, json!({ "path": "", "includeEntry": true }));
    agent.put("f", "content");
    fs::rename(agent.outside("/home/user/f"), agent.outside("/home/user/g")).unwrap();
    let events = agent.ok("filesystem.Filesystem/GetWatcherEvents", &watcher)["events"].clone();
    assert_eq!(brief(&events), ["CREATE f", "CHMOD f", "WRITE f", "RENAME f", "CREATE g"]);
    assert_eq!(events[3].get("entry"), None);
    assert_eq!(events[4]["entry"]["path"], "/home/user/g");
    assert_eq!(events[4]["entry"]["size"], "7");
}

#[test]
fn a_removed_watcher_is_gone() {
    let agent = Agent::start();
    let watcher = create_watcher(&agent, json!({ "path": "" }));
    assert!(watches(&agent));
    assert_eq!(agent.ok("filesystem.Filesystem/RemoveWatcher", &watcher), json!({}));
    assert_eq!(code(&agent, "GetWatcherEvents", watcher.clone()), is(404, "not_found"));
    wait_for("inotify to be closed", || !watches(&agent));
}

#[test]
fn watchers_are_bounded() {
    let agent = Agent::start();
    let create = || agent.call("filesystem.Filesystem/CreateWatcher", &json!({ "path": "" }));
    let refused = (0..200).map(|_| create()).find(|answer| answer.status != 200).unwrap();
    assert_eq!(refused.code(), "resource_exhausted", "{}", refused.text());
}

/// Whether the agent has an inotify instance open.
fn watches(agent: &Agent) -> bool {
    let mut fds = fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap();
    fds.any(|fd| fs::read_link(fd.unwrap().path()).is_ok_and(|target| target.to_str() == Some("anon_inode:inotify")))
}

fn watch(agent: &Agent, headers: &[(&str, &str)], request: Value) -> Stream {
    agent.stream("filesystem.Filesystem/WatchDir", headers, &[request])
}

#[test]
fn a_stream_starts_and_then_tells_every_change() {
    let agent = Agent::start();
    let mut stream = watch(&agent, &[], json!({ "path": "", "recursive": true }));
    assert_eq!(stream.next(), Ok(json!({ "start": {} })));
    agent.put("d/f", "content");
    let mut told = Vec::new();
    while told.last().map(String::as_str) != Some("WRITE d/f") {
        told.push(brief_one(&stream.next().unwrap()["filesystem"]));
    }
    assert_eq!((told[0].as_str(), told.iter().filter(|event| *event == "CREATE d/f").count()), ("CREATE d", 1));
    drop(stream);
    wait_for("the watch to end with its client", || !watches(&agent));
}

#[test]
fn silence_is_kept_alive_at_the_clients_interval() {
    let agent = Agent::start();
    let mut stream = watch(&agent, &[("Keepalive-Ping-Interval", "1")], json!({ "path": "" }));
    assert_eq!(stream.next(), Ok(json!({ "start": {} })));
    let start = Instant::now();
    for _ in 0..2 {
        assert_eq!(stream.next(), Ok(json!({ "keepalive": {} })));
    }
    assert!(start.elapsed() >= Duration::from_millis(1900), "{:?}", start.elapsed());
}

#[test]
fn a_stream_ends_at_its_timeout() {
    let agent = Agent::start();
    let mut stream = watch(&agent, &[("Connect-Timeout-Ms", "300")], json!({ "path": "" }));
    assert_eq!(stream.next(), Ok(json!({ "start": {} })));
    let end = stream.next().unwrap_err();
    assert_eq!(end["error"]["code"], "deadline_exceeded", "{end}");
}

#[test]
fn a_stream_that_cannot_start_ends_with_the_reason() {
    let agent = Agent::start();
    let end = watch(&agent, &[], json!({ "path": "nothing" })).next().unwrap_err();
    assert_eq!(end["error"]["code"], "not_found", "{end}");
    assert_eq!(end["error"]["message"], "path /home/user/nothing not found");
}
