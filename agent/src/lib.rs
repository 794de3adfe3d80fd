//! The agent: pid 1 of every sandbox. It starts the sandbox's processes, reaps them, and speaks envd's wire on port
//! 49983: Connect-RPC services `process.Process` and `filesystem.Filesystem`, and the plain HTTP routes beside them.
//!
//! ```text
//! main ─> pid1 (secret from fd 0, stdio, lo) ─> serve ─┬─ http: /health /metrics /envs /init /files /stillbox/logs
//!                                                      ├─ rpc:  process.rs -> process/   filesystem/
//!                                                      ├─ hopx: the same under HopX's wire, for the host's proxy alone
//!                                                      └─ interpreter: port 49999, where the template has one
//! state (Agent) <── init replaces the identity; auth, users and paths answer who asks and where
//! ```
//!
//! Rules that every module keeps:
//! * **No NSS.** A static glibc program dies in getpwnam or getaddrinfo as soon as the image's nsswitch.conf names a
//!   module. `users` parses /etc/passwd and /etc/group itself; nothing resolves names.
//! * **CRIU dumps this process at any moment**: epoll, pipes, PTYs, inotify and sockets only; no io_uring, no
//!   userfaultfd. Timers run on CLOCK_MONOTONIC, since the wall clock jumps at a restore.
//! * **One thread** runs everything that forks or waits; file work that may block goes to the threads of `blocking`,
//!   never to tokio's pool, which panics when the sandbox has run out of processes.
//! * It starts generic. What names one sandbox arrives by `/init` and may be replaced by a later `/init`.
//!
//! RPC is the crate `connectrpc`, chosen after a trial over some 600 lines of our own on axum: it speaks the exact
//! wire of the contract (content types, envelopes, end-stream errors, int64 as string, snake_case and unknown fields
//! accepted), gives binary protobuf for free, leaves the deadline of a stream to the handler (which `Start` needs, to
//! kill its process), and came out at 2.4 MB as a static binary.
//!
//! The host uses [`wire`] alone, with `default-features = false`.

pub mod wire;

#[cfg(feature = "agent")]
mod auth;
#[cfg(feature = "agent")]
mod blocking;
#[cfg(feature = "agent")]
mod error;
#[cfg(feature = "agent")]
mod files;
#[cfg(feature = "agent")]
mod filesystem;
#[cfg(feature = "agent")]
mod hopx;
#[cfg(feature = "agent")]
mod http;
#[cfg(feature = "agent")]
mod init;
#[cfg(feature = "agent")]
mod interpreter;
#[cfg(feature = "agent")]
mod logs;
#[cfg(feature = "agent")]
mod memory;
#[cfg(feature = "agent")]
mod metrics;
#[cfg(feature = "agent")]
mod paths;
#[cfg(feature = "agent")]
pub mod pid1;
#[cfg(feature = "agent")]
mod process;
#[cfg(feature = "agent")]
mod rpc;
#[cfg(feature = "agent")]
pub mod serve;
#[cfg(feature = "agent")]
mod state;
#[cfg(feature = "agent")]
mod sys;
#[cfg(feature = "agent")]
mod users;
