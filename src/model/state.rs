//! The states of a sandbox and the moves between them.
//!
//! ```text
//!            create                       pause                    resume
//! (none) ──> Creating ──> Running ──> Pausing ──> Paused ──> Resuming ──> Running
//!               │            │  ^         │          │           │
//!               │            │  └─failed──┘          │<──failed──┘      (snapshot kept)
//!               └──> Failed  └──────> Killing <──────┘
//!                                        └──> Killed
//! ```
//! Killing is reachable from every live state: kill is always accepted and wins.

use std::fmt;

/// Where a sandbox stands. Written to the store before the kernel is touched ("intent first").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// Being made; not yet known to anybody but its creator.
    Creating,
    /// Its processes run.
    Running,
    /// A dump or a stop for `Keep::FilesOnly` is under way.
    Pausing,
    /// No processes; its files, and with `Keep::Memory` its memory, are on disk.
    Paused,
    /// A restore or cold boot of a paused one is under way.
    Resuming,
    /// Being removed; for its users it is gone already.
    Killing,
    /// Gone. The row stays for a while, for metrics and logs.
    Killed,
    /// Could not be created; cleaned up.
    Failed,
}

impl SandboxState {
    /// Every state, in the order of the diagram.
    pub const ALL: [Self; 8] =
        [Self::Creating, Self::Running, Self::Pausing, Self::Paused, Self::Resuming, Self::Killing, Self::Killed, Self::Failed];

    /// The word in rows, logs and error messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Killing => "killing",
            Self::Killed => "killed",
            Self::Failed => "failed",
        }
    }

    /// The state with this word, if there is one.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Whether the diagram has an arrow from `self` to `next`.
    pub const fn may_become(self, next: Self) -> bool {
        use SandboxState::*;
        match self {
            Creating => matches!(next, Running | Failed | Killing),
            Running => matches!(next, Pausing | Killing),
            Pausing => matches!(next, Paused | Running | Killing),
            Paused => matches!(next, Resuming | Killing),
            Resuming => matches!(next, Running | Paused | Killing),
            Killing => matches!(next, Killed),
            Killed | Failed => false,
        }
    }

    /// Whether the sandbox still exists for its users: kill, connect and info find it.
    pub const fn is_live(self) -> bool {
        match self {
            Self::Running | Self::Pausing | Self::Paused | Self::Resuming => true,
            Self::Creating | Self::Killing | Self::Killed | Self::Failed => false,
        }
    }

    /// Whether nothing will ever change again.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Killed | Self::Failed)
    }
}

impl fmt::Display for SandboxState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_back_from_its_word() {
        for state in SandboxState::ALL {
            assert_eq!(SandboxState::from_word(state.as_str()), Some(state));
        }
    }

    #[test]
    fn every_state_that_is_not_final_can_be_killed_and_final_ones_never_change() {
        for state in SandboxState::ALL {
            let to_killing = state.may_become(SandboxState::Killing) || state == SandboxState::Killing;
            assert_eq!(to_killing, !state.is_final(), "{state}");
            for next in SandboxState::ALL {
                assert!(!(state.is_final() && state.may_become(next)), "{state} became {next}");
            }
        }
    }

    #[test]
    fn a_failed_pause_runs_on_and_a_failed_resume_stays_paused() {
        assert!(SandboxState::Pausing.may_become(SandboxState::Running));
        assert!(SandboxState::Resuming.may_become(SandboxState::Paused));
        assert!(!SandboxState::Paused.may_become(SandboxState::Running));
    }
}
