//! What the agent knows: who it is (replaced by /init), the control secret, and what runs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::filesystem::watchers::Watchers;
use crate::hopx::Hopx;
use crate::init::front::FrontDoor;
use crate::interpreter::Interpreter;
use crate::logs::Log;
use crate::metrics::CpuMeter;
use crate::process::Table;
use crate::process::reaper::Reaper;

/// Variables that say where a program runs. /init sets them, and no request overrides them.
pub(crate) const INTERNAL_ENVS: [&str; 4] = ["E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID", "E2B_EVENTS_ADDRESS"];

/// The agent's state, one per process, shared by all handlers.
#[derive(Debug)]
pub(crate) struct Agent {
    identity: RwLock<Arc<Identity>>,
    control_secret: Mutex<String>,
    pub(crate) watchers: Watchers,
    pub(crate) processes: Table,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) log: Log,
    pub(crate) cpu_meter: CpuMeter,
    pub(crate) interpreter: Interpreter,
    pub(crate) hopx: Hopx,
    pub(crate) front: FrontDoor,
}

/// Which sandbox this is. Taken whole by a request when it begins, so that an /init in between changes nothing for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) access: Access,
    /// Empty before the first /init.
    pub(crate) sandbox_id: String,
    /// Variables of every process: the template's, then the sandbox's, then our own E2B_* on top. [`Identity::compose`]
    /// makes them of the three.
    pub(crate) envs: BTreeMap<String, String>,
    /// The CA bundle's and the template's.
    pub(crate) lower_envs: BTreeMap<String, String>,
    /// The sandbox's own.
    pub(crate) own_envs: BTreeMap<String, String>,
    pub(crate) own_envs_from: EnvsFrom,
    /// The PATH that the agent was started with.
    pub(crate) path: String,
    pub(crate) default_user: String,
    /// Empty means the user's home.
    pub(crate) default_workdir: String,
    pub(crate) generation: u64,
    pub(crate) cpu_count: Option<u32>,
    pub(crate) memory_bytes: Option<u64>,
}

/// Who said last what the sandbox's own variables are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EnvsFrom {
    Init,
    /// Its user, at run time. They survive a later /init of the same sandbox, which knows only those of the create.
    User,
}

/// Who may use envd's wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Access {
    /// Before the first /init: nobody.
    Closed,
    Open,
    Token(String),
}

impl Agent {
    /// A generic agent: it answers /health and waits for /init.
    pub(crate) fn new(control_secret: String, path: String) -> Arc<Agent> {
        Arc::new(Agent {
            identity: RwLock::new(Arc::new(Identity::generic(path))),
            control_secret: Mutex::new(control_secret),
            processes: Table::default(),
            reaper: Arc::default(),
            log: Log::default(),
            cpu_meter: CpuMeter::new(),
            watchers: Watchers::default(),
            interpreter: Interpreter::default(),
            hopx: Hopx::default(),
            front: FrontDoor::default(),
        })
    }

    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Requests that have begun keep the former one.
    pub(crate) fn replace_identity(&self, identity: Identity) {
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
    }

    /// Replaces the sandbox's own variables, for everything that starts from now on.
    pub(crate) fn set_own_envs(&self, own_envs: BTreeMap<String, String>) {
        let mut identity = self.identity.write().unwrap_or_else(PoisonError::into_inner);
        let changed = Identity { own_envs, own_envs_from: EnvsFrom::User, ..Identity::clone(&identity) };
        *identity = Arc::new(changed.composed());
        drop(identity);
        self.interpreter.share_envs();
    }

    /// Holds the control secret; whoever holds the guard is the only one to rotate it.
    pub(crate) fn control_secret(&self) -> MutexGuard<'_, String> {
        self.control_secret.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Identity {
    /// Nobody's, and closed to all.
    pub(crate) fn generic(path: String) -> Identity {
        Identity {
            access: Access::Closed,
            sandbox_id: String::new(),
            envs: BTreeMap::new(),
            lower_envs: BTreeMap::new(),
            own_envs: BTreeMap::new(),
            own_envs_from: EnvsFrom::Init,
            path,
            default_user: "user".to_owned(),
            default_workdir: String::new(),
            generation: 0,
            cpu_count: None,
            memory_bytes: None,
        }
    }

    /// With `envs` made anew of what they consist of.
    pub(crate) fn composed(self) -> Identity {
        let internal = self.envs.iter().filter(|(name, _)| INTERNAL_ENVS.contains(&name.as_str()));
        let all = self.lower_envs.iter().chain(&self.own_envs).chain(internal);
        let envs = all.map(|(name, value)| (name.clone(), value.clone())).collect();
        Identity { envs, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn own_variables_stand_above_the_templates_and_below_the_internal_ones() {
        let agent = Agent::new("0".repeat(64), "/bin".to_owned());
        agent.replace_identity(
            Identity {
                envs: variables(&[("E2B_SANDBOX", "true")]),
                lower_envs: variables(&[("A", "template"), ("B", "template")]),
                ..Identity::generic("/bin".to_owned())
            }
            .composed(),
        );
        agent.set_own_envs(variables(&[("B", "own"), ("E2B_SANDBOX", "no")]));
        assert_eq!(agent.identity().envs, variables(&[("A", "template"), ("B", "own"), ("E2B_SANDBOX", "true")]));
        agent.set_own_envs(BTreeMap::new());
        assert_eq!(agent.identity().envs, variables(&[("A", "template"), ("B", "template"), ("E2B_SANDBOX", "true")]));
    }
}
