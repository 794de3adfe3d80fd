//! Registering a build: its template is found by name or made, its row is written, nothing is built yet.

use super::super::name::{DEFAULT_TAG, Name, TagList};
use super::super::now;
use super::{Builds, ResolveError};
use crate::model::{BuildId, BuildRecord, BuildSource, BuildState, ByteSize, Resources, TemplateId, TemplateRecord};
use crate::store::{Db, StoreError, builds, templates};
use std::collections::BTreeMap;
use time::OffsetDateTime;

/// E2B's bounds.
const CPU_MAX: u32 = 32;
const MEMORY_MIN_MIB: u64 = 128;

/// What a new build is to be called and how large its sandboxes are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewBuild {
    /// `name` or `name:tag`.
    pub name: String,
    /// Further tags; without any, `default`.
    pub tags: Vec<String>,
    /// CPUs of its sandboxes.
    pub cpu_count: Option<u32>,
    /// Memory of its sandboxes.
    pub memory_mib: Option<u64>,
}

/// A build that waits to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Registered {
    /// Its template, found or made.
    pub template: TemplateRecord,
    /// The build.
    pub build: BuildId,
    /// What will lead to it.
    pub tags: Vec<String>,
}

/// Why a build was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The name or a tag is malformed, or the store failed.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The name is that of a snapshot.
    #[error("'{0}' is the name of a snapshot; choose another, or delete the snapshot")]
    Snapshot(String),
    /// A size that cannot be had.
    #[error("{field} is {value}; {rule}")]
    Size {
        /// The field.
        field: &'static str,
        /// As asked.
        value: u64,
        /// What would do.
        rule: String,
    },
}

impl From<StoreError> for RegisterError {
    fn from(error: StoreError) -> Self {
        Self::Resolve(error.into())
    }
}

impl Builds {
    /// Registers a build of the template with this name, which is made if there is none.
    pub async fn register(&self, new: NewBuild) -> Result<Registered, RegisterError> {
        let name = Name::parse(&new.name)?;
        let resources = sized(self.inner.resources, &new)?;
        let mut tags = TagList::of(&new.tags)?;
        if name.has_tag {
            tags.put_first(&name.tag);
        }
        if tags.0.is_empty() {
            tags.put_first(DEFAULT_TAG);
        }
        self.inner.means.store.write(move |db| Ok(register(db, &name, tags.0, resources, now()))).await?
    }
}

fn register(db: &Db<'_>, name: &Name, tags: Vec<String>, resources: Resources, at: OffsetDateTime) -> Result<Registered, RegisterError> {
    let known = match templates::id_of_alias(db, &name.template)? {
        Some(id) => templates::by_id(db, id)?,
        // Older clients rebuild by id.
        None => name.template.parse().ok().map(|id| templates::by_id(db, id)).transpose()?.flatten(),
    };
    let template = match known {
        Some(template) if templates::builds_of(db, template.id)?.iter().any(|build| build.source != BuildSource::Recipe) => {
            return Err(RegisterError::Snapshot(name.template.clone()));
        }
        Some(template) => template,
        None => new_template(db, name, at)?,
    };
    let record = new_record(template.id, resources, at);
    builds::insert(db, &record, &tags)?;
    Ok(Registered { template, build: record.id, tags })
}

fn new_template(db: &Db<'_>, name: &Name, at: OffsetDateTime) -> Result<TemplateRecord, StoreError> {
    let template = TemplateRecord::new(TemplateId::random(), vec![name.template.clone()], at);
    templates::insert(db, &template)?;
    Ok(template)
}

fn new_record(template: TemplateId, resources: Resources, at: OffsetDateTime) -> BuildRecord {
    BuildRecord {
        id: BuildId::random(),
        template,
        state: BuildState::Waiting,
        layers: Vec::new(),
        env: BTreeMap::new(),
        user: String::new(),
        workdir: String::new(),
        start_command: None,
        ready_command: None,
        resources,
        source: BuildSource::Recipe,
        origin: String::new(),
        dump: None,
        created_at: at,
        finished_at: None,
    }
}

/// E2B's rules: one CPU or an even number, an even number of MiB.
fn sized(resources: Resources, new: &NewBuild) -> Result<Resources, RegisterError> {
    let cpu_count = new.cpu_count.unwrap_or(resources.cpu_count);
    if cpu_count == 0 || cpu_count > CPU_MAX || (cpu_count > 1 && cpu_count % 2 == 1 && new.cpu_count.is_some()) {
        let rule = format!("it must be 1 or an even number up to {CPU_MAX}");
        return Err(RegisterError::Size { field: "cpuCount", value: cpu_count.into(), rule });
    }
    let Some(mib) = new.memory_mib else { return Ok(Resources { cpu_count, ..resources }) };
    if mib < MEMORY_MIN_MIB || mib % 2 == 1 || mib > 1 << 20 {
        let rule = format!("it must be an even number from {MEMORY_MIN_MIB} to {}", 1 << 20);
        return Err(RegisterError::Size { field: "memoryMB", value: mib, rule });
    }
    Ok(Resources { cpu_count, memory: ByteSize::mib(mib), ..resources })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(cpu_count: Option<u32>, memory_mib: Option<u64>) -> Result<Resources, String> {
        let resources = Resources { cpu_count: 2, memory: ByteSize::gib(1), disk: ByteSize::gib(20), pids_max: 100 };
        let new = NewBuild { cpu_count, memory_mib, ..NewBuild::default() };
        sized(resources, &new).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_follow_the_rules_and_the_rest_is_the_machine_s() {
        let sized = asked(Some(4), Some(512)).unwrap();
        assert_eq!((sized.cpu_count, sized.memory, sized.disk), (4, ByteSize::mib(512), ByteSize::gib(20)));
        assert_eq!(asked(None, None).unwrap().memory, ByteSize::gib(1));
        assert_eq!(asked(Some(3), None).unwrap_err(), "cpuCount is 3; it must be 1 or an even number up to 32");
        assert!(asked(None, Some(127)).unwrap_err().starts_with("memoryMB is 127; it must be an even number from 128"));
    }
}
