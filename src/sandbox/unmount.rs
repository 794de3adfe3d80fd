//! FUSE mounts in the way of a pause, taken out of it where the configuration says so (`pause.unmount_fuse`).
//!
//! CRIU cannot save them: the other end of such a mount is a program's memory and, mostly, a connection to somewhere. They
//! are unmounted lazily: files that are still open on them stay usable and keep the pause refused. Nothing is mounted again
//! after a resume.

use super::driver::Driver;
use super::exec::{self, Agent, Command, Until};
use super::tokens::TokenKind;
use crate::model::{LogLevel, Secure};
use crate::runtime::{Finding, RuntimeError};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Unmounts what is there and prints the places.
const SCRIPT: &str = r#"while read -r _ place kind _; do
    case $kind in fuse|fuse.*|fuseblk) umount -l "$(printf '%b' "$place")" && printf '%b\n' "$place";; esac
done < /proc/mounts"#;
const UNMOUNT_MAX: Duration = Duration::from_secs(5);
/// What is read of the places.
const PRINTED_MAX: usize = 64 << 10;
/// Until the program behind a mount has noticed that it is gone.
const SETTLE_MAX: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Driver {
    /// Takes FUSE mounts out of the way; what is left of them is found by the check before the dump.
    pub(super) async fn clear_fuse(&mut self) -> Result<(), RuntimeError> {
        let (runtime, id) = (Arc::clone(&self.core.runtime), self.id);
        let Some(findings) = self.serve_until_killed(runtime.findings(id)).await else { return Ok(()) };
        if !findings?.iter().any(is_fuse) {
            return Ok(());
        }
        let unmounted = self.unmount_fuse().await;
        if !unmounted.is_empty() {
            self.log_line(LogLevel::Warn, format!("unmounted for a pause, and not mounted again after it: {}", unmounted.join(", ")));
        }
        let settle = async {
            let deadline = tokio::time::Instant::now() + SETTLE_MAX;
            loop {
                let left = runtime.findings(id).await?;
                if !left.iter().any(is_fuse) || tokio::time::Instant::now() >= deadline {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        self.serve_until_killed(settle).await.unwrap_or(Ok(()))
    }

    /// The places that were unmounted. A failure is a finding that stays.
    async fn unmount_fuse(&mut self) -> Vec<String> {
        let token = match self.record.spec.secure {
            Secure::Token => Some(self.core.key.token(TokenKind::EnvdAccess, self.id)),
            Secure::Open => None,
        };
        let (runtime, id, env) = (Arc::clone(&self.core.runtime), self.id, BTreeMap::new());
        let mut printed = Vec::new();
        let run = async {
            let agent = Agent { runtime: &runtime, id, token: token.as_deref() };
            let command = Command { user: "root", cwd: "/", env: &env, script: SCRIPT };
            let mut keep = |piece: exec::Printed<'_>| {
                if let exec::Printed::Stdout(bytes) = piece {
                    let room = PRINTED_MAX.saturating_sub(printed.len());
                    printed.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
            };
            let ran = tokio::time::timeout(UNMOUNT_MAX, exec::run(agent, command, Until::Ended, &mut keep)).await;
            if let Ok(Err(error)) = &ran {
                tracing::warn!(sandbox.id = %id, error = super::error::chain(error), "Could not unmount FUSE file systems in sandbox {id}");
            }
        };
        self.serve_during(run).await;
        String::from_utf8_lossy(&printed).lines().map(|line| line.chars().take(256).collect()).collect()
    }
}

/// A mount, or the program that serves it.
fn is_fuse(finding: &Finding) -> bool {
    finding.reason.contains("FUSE") || finding.reason.contains("type fuse")
}
