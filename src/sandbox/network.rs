//! Replacing the egress half of a running sandbox's network policy.

use super::driver::Driver;
use super::error::{StoreFailure, UnknownSandbox, chain};
use crate::model::{NetworkPolicy, SandboxId, SandboxState};

/// Why egress rules were not replaced.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Not there.
    #[error(transparent)]
    Unknown(#[from] UnknownSandbox),
    /// There, but not running.
    #[error("sandbox {id} is {state}; only a running sandbox's network can be changed")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
        /// Where it stands.
        state: SandboxState,
    },
    /// The kernel refused; the rules are as they were.
    #[error("could not change the network of sandbox {id}")]
    Apply {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreFailure),
}

impl Driver {
    /// The kernel first, then the row: whatever comes in between, the rules become the row's again, which the caller was
    /// never told to be gone. After a crash it is the next server that sees to it, when it takes the sandbox over.
    pub(super) async fn set_network(&mut self, asked: NetworkPolicy) -> Result<(), NetworkError> {
        let now = &self.record.spec.network;
        let policy = NetworkPolicy {
            public_traffic: now.public_traffic,
            mask_request_host: now.mask_request_host.clone(),
            secrets: now.secrets.clone(),
            https_ports: now.https_ports.clone(),
            ..asked
        };
        let (runtime, id) = (std::sync::Arc::clone(&self.core.runtime), self.id);
        let applied = self.serve_during(runtime.set_network(id, &policy)).await;
        applied.map_err(|error| NetworkError::Apply { id, source: Box::new(error) })?;
        self.core.failpoints.pass("network.applied").await;
        let before = std::mem::replace(&mut self.record.spec.network, policy);
        if let Err(error) = self.write_row().await {
            self.record.spec.network = before;
            let undone = self.serve_during(runtime.set_network(id, &self.record.spec.network.clone())).await;
            if let Err(undone) = undone {
                tracing::error!(sandbox.id = %id, error = chain(&undone), "Sandbox {id} has other egress rules than its row");
            }
            return Err(StoreFailure::from(error).into());
        }
        self.publish();
        Ok(())
    }
}
