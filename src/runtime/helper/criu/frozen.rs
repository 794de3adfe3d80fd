//! A sandbox whose tasks stand still by its cgroup, traced or not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the tasks may take to come to rest; those that sleep in the kernel do so at once.
const REST_WITHIN: Duration = Duration::from_millis(100);

/// Dropped, it goes on.
#[derive(Debug)]
pub(super) struct Frozen {
    switches: Vec<Switch>,
}

#[derive(Debug)]
struct Switch {
    file: PathBuf,
    /// What the file is told to let them go on.
    thaw: &'static str,
}

impl Frozen {
    /// Freezes what can be frozen: where no freezer is mounted, nothing.
    pub(super) fn freeze(cgroups: &[PathBuf]) -> Self {
        let frozen = Self { switches: cgroups.iter().filter_map(|folder| freeze(folder).ok()).collect() };
        let deadline = Instant::now() + REST_WITHIN;
        while !frozen.is_at_rest(cgroups) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        frozen
    }

    fn is_at_rest(&self, cgroups: &[PathBuf]) -> bool {
        let says = |file: PathBuf, word: &str| fs::read_to_string(file).is_ok_and(|text| text.lines().any(|line| line == word));
        let is_frozen = |folder: &PathBuf| says(folder.join("freezer.state"), "FROZEN") || says(folder.join("cgroup.events"), "frozen 1");
        self.switches.is_empty() || cgroups.iter().any(is_frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for switch in &self.switches {
            // A cgroup that is gone has nobody in it.
            let _ = fs::write(&switch.file, switch.thaw);
        }
    }
}

fn freeze(folder: &Path) -> io::Result<Switch> {
    let (v1, v2) = (folder.join("freezer.state"), folder.join("cgroup.freeze"));
    let (file, freeze, thaw) = match v1.exists() {
        true => (v1, "FROZEN", "THAWED"),
        false => (v2, "1", "0"),
    };
    // Not `fs::write`, which would make a file where there is none.
    fs::OpenOptions::new().write(true).open(&file).and_then(|mut opened| io::Write::write_all(&mut opened, freeze.as_bytes()))?;
    Ok(Switch { file, thaw })
}
