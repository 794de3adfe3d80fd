//! The helper: this binary executed anew for one operation on the kernel, single-threaded, JSON in and out.
//!
//! libcontainer and CRIU exist only below here, and only in that process: both change what belongs to a whole
//! process (working directory, mounts, namespaces). [`client`] is the server's side.

mod bundle;
pub(crate) mod client;
pub(crate) mod container;
pub(crate) mod criu;
pub mod main;

use std::error::Error;

/// A step of an operation that failed, as it travels to the server: what was done, and why it failed, outermost
/// reason first.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct HelperStep {
    step: String,
    reasons: Vec<String>,
}

impl HelperStep {
    fn new(step: &str, reason: impl Into<String>) -> Self {
        Self { step: step.to_owned(), reasons: vec![reason.into()] }
    }

    /// Names the step that an error happened in.
    fn wrap<E: Error>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |error| {
            let mut reasons = vec![error.to_string()];
            let mut cause = error.source();
            while let Some(error) = cause {
                reasons.push(error.to_string());
                cause = error.source();
            }
            Self { step: step.to_owned(), reasons }
        }
    }
}

impl std::fmt::Display for HelperStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} failed: {}", self.step, self.reasons.join(": "))
    }
}

impl Error for HelperStep {}

/// One operation: what it is called on the command line, what it is told and what it answers.
pub(crate) trait Operation: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug {
    /// `stillbox runtime <VERB>`.
    const VERB: &'static str;
    /// What success answers.
    type Answer: serde::Serialize + serde::de::DeserializeOwned;
    /// Does it, in the helper process.
    fn run(&self) -> Result<Self::Answer, HelperStep>;
}

impl Operation for container::ColdStart {
    const VERB: &'static str = "create";
    type Answer = crate::model::ProcessRef;
    fn run(&self) -> Result<Self::Answer, HelperStep> {
        container::start(self)
    }
}
