//! The agent where the sandbox has run out of something.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::support::{Agent, wait_for};

/// A cgroup that allows no process or thread beyond those that are in it.
struct Full {
    path: PathBuf,
}

impl Full {
    fn around(agent: &Agent) -> Full {
        let controller = Path::new("/sys/fs/cgroup/pids");
        let root = if controller.exists() { controller } else { Path::new("/sys/fs/cgroup") };
        let full = Full { path: root.join(format!("stillbox-agent-test-{}", agent.pid())) };
        fs::create_dir(&full.path).unwrap();
        full.write("cgroup.procs", &agent.pid().to_string());
        full.write("pids.max", "0");
        full
    }

    fn write(&self, file: &str, value: &str) {
        fs::write(self.path.join(file), value).unwrap();
    }

    fn threads(&self) -> String {
        fs::read_to_string(self.path.join("pids.current")).unwrap()
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // The agent has been killed by now; the kernel may still be busy with its end. No panic: one may be under way.
        for _ in 0..500 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

#[test]
fn files_are_served_when_no_thread_can_be_had() {
    // Dropped in the reverse order: first the agent ends, then its cgroup goes.
    let full;
    let agent = Agent::start();
    full = Full::around(&agent);
    wait_for("idle threads to go", || full.threads().trim() == "2");
    for number in 0..20 {
        let path = format!("f{number}");
        assert_eq!(agent.put(&path, "content").status, 200);
        assert_eq!(agent.ok("filesystem.Filesystem/Stat", &json!({ "path": path }))["entry"]["size"], "7");
    }
    assert_eq!(agent.get("/metrics").status, 200);
    assert_eq!(full.threads().trim(), "2", "the one that serves and the one that stays");
}

#[test]
fn a_tree_deeper_than_paths_and_stacks_is_listed_watched_and_removed() {
    let agent = Agent::start();
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let mut directory = rustix::fs::open(agent.outside("/home/user"), flags, Mode::empty()).unwrap();
    for _ in 0..2500 {
        rustix::fs::mkdirat(&directory, "d", Mode::RWXU).unwrap();
        directory = rustix::fs::openat(&directory, "d", flags, Mode::empty()).unwrap();
    }
    let listing = agent.ok("filesystem.Filesystem/ListDir", &json!({ "path": "", "depth": 5000 }));
    let levels = listing["entries"].as_array().unwrap().len();
    assert!(levels > 2000, "as far as a path reaches: {levels}");
    agent.ok("filesystem.Filesystem/CreateWatcher", &json!({ "path": "", "recursive": true }));
    agent.ok("filesystem.Filesystem/Remove", &json!({ "path": "d" }));
    assert!(!agent.outside("/home/user/d").exists());
}
