//! One build from its base to its ready state: resolve the base, do each step or take it from the cache, dump.
//!
//! Steps that change settings only are done here; RUN and COPY run in a sandbox of their own, and what they wrote becomes
//! a layer (harvest.rs). A failure names the part of the build that is to blame, in the words that E2B's SDKs expect.

use super::super::image::{self, ImageRequest};
use super::super::{Lease, ResolveError, Resolved, TemplateConfig, Templates};
use super::log::{BuildLog, Output};
use super::merge::{self, LAYERS_MAX};
use super::plan::{Base, Cache, Copy, Instruction, Plan};
use super::state::{Errand, State, each_once};
use super::uploads::Uploads;
use super::{harvest, view::View};
use crate::model::{BuildFailure, BuildRecord, BuildSource, BuildState, LogLevel};
use crate::sandbox::{Command, ExecError, Printed, ReadyStateError, Registry, Witness, Workshop, WorkshopRequest};
use crate::store::{Store, StoreError, builds};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;

const COPY_SCRIPT: &str = include_str!("copy.sh");
const PROVISION_SCRIPT: &str = include_str!("provision.sh");
/// Where a COPY step's archive is put and unpacked: the agent's folder, which is no part of a layer.
const ARCHIVE: &str = "/run/stillbox/copy.tar";
const UNPACKED: &str = "/run/stillbox/copy";
/// Who runs the steps on an image, in his home, until a step says otherwise.
const DEFAULT_USER: &str = "user";
/// What E2B waits for a start command that nobody can ask whether it is ready.
const DEFAULT_READY_COMMAND: &str = "sleep 20";
/// The parts of a build that are no step.
const BASE: &str = "base";
const FINALIZE: &str = "finalize";

/// What a build needs.
#[derive(Debug, Clone)]
pub(super) struct Means {
    pub(super) config: Arc<TemplateConfig>,
    pub(super) store: Store,
    pub(super) registry: Registry,
    pub(super) templates: Templates,
    pub(super) uploads: Uploads,
    pub(super) step_time_max: Duration,
}

/// Does the whole build; its row is ready afterwards. Dropping the future stops it and leaves the row as it is.
pub(super) async fn run(means: &Means, log: &BuildLog, build: BuildRecord, plan: Plan) -> Result<(), BuildFailure> {
    let begun = Instant::now();
    log.say(LogLevel::Info, format!("Building template {}/{}", build.template, build.id));
    let instructions = understood(&plan)?;
    let mut driver = Driver { means, log, build, cache: plan.cache, state: State::default(), held: Vec::new(), base_layers: 0 };
    let commands = driver.base(&plan.base).await?;
    let count = instructions.len();
    for ((number, step), instruction) in (1..).zip(&plan.steps).zip(&instructions) {
        if step.cache == Cache::Skip {
            driver.cache = Cache::Skip;
        }
        let part = Part { step: number.to_string(), prefix: format!("builder {number}/{count}"), shown: step.shown() };
        driver.step(number, &part, instruction).await?;
    }
    driver.run_errands_left().await?;
    let own = Commands { start: plan.start_command, ready: plan.ready_command };
    driver.finalize(own.or(commands), begun).await
}

fn understood(plan: &Plan) -> Result<Vec<Instruction>, BuildFailure> {
    let failed = |number: usize, error: &dyn Error| BuildFailure { message: error.to_string(), step: Some(number.to_string()) };
    (1..).zip(&plan.steps).map(|(number, step)| Instruction::of(step).map_err(|error| failed(number, &error))).collect()
}

/// Start and ready command.
struct Commands {
    start: Option<String>,
    ready: Option<String>,
}

impl Commands {
    /// These, if there are any, and those of the base otherwise.
    fn or(self, base: Self) -> Self {
        let is_given = |command: &Option<String>| command.as_ref().is_some_and(|command| !command.trim().is_empty());
        let chosen = if is_given(&self.start) || is_given(&self.ready) { self } else { base };
        let start = chosen.start.filter(|command| !command.trim().is_empty());
        let ready = chosen.ready.filter(|command| !command.trim().is_empty());
        let by_default = start.as_ref().map(|_| DEFAULT_READY_COMMAND.to_owned());
        Self { start, ready: ready.or(by_default) }
    }
}

/// One part of a build, as the log names it.
struct Part {
    step: String,
    prefix: String,
    shown: String,
}

impl Part {
    fn of(name: &str, shown: impl Into<String>) -> Self {
        Self { step: name.to_owned(), prefix: name.to_owned(), shown: shown.into() }
    }

    fn failed(&self, message: impl Into<String>) -> BuildFailure {
        BuildFailure { message: message.into(), step: Some(self.step.clone()) }
    }

    /// What is not the builder's fault; he is told all the same, since this machine is his.
    fn broke(&self, error: &(dyn Error + 'static)) -> BuildFailure {
        self.failed(chain(error))
    }
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What runs in a sandbox, after the errands that are left for it.
#[derive(Debug, Clone, Copy)]
enum Work<'a> {
    Run { script: &'a str, user: Option<&'a str> },
    Copy(&'a Copy),
    AsRoot(&'static str),
    Errands,
}

struct Driver<'a> {
    means: &'a Means,
    log: &'a BuildLog,
    build: BuildRecord,
    cache: Cache,
    state: State,
    /// Layers that no row names yet.
    held: Vec<Lease>,
    /// How many of the layers are the base's.
    base_layers: usize,
}

impl Driver<'_> {
    // ------------------------------------------------------------ base

    async fn base(&mut self, base: &Base) -> Result<Commands, BuildFailure> {
        match base {
            Base::Template(name) => self.base_template(name).await,
            Base::Image(request) => match image::template_for(&self.means.config, request) {
                Some(name) => {
                    let commands = self.base_template(&name).await?;
                    // Its steps run as on the image that the template stands in for.
                    self.state.user = DEFAULT_USER.to_owned();
                    self.state.workdir = String::new();
                    Ok(commands)
                }
                None => self.base_image(request).await.map(|()| Commands { start: None, ready: None }),
            },
        }
    }

    async fn base_template(&mut self, name: &str) -> Result<Commands, BuildFailure> {
        let part = Part::of(BASE, format!("FROM TEMPLATE {name}"));
        let Resolved { build, .. } = self.means.templates.resolve(name).await.map_err(|error| match error {
            ResolveError::Store(_) => part.broke(&error),
            _ => part.failed(error.to_string()),
        })?;
        match (build.source, build.state) {
            (BuildSource::Recipe, BuildState::Ready) => {}
            (BuildSource::Recipe, _) => return Err(part.failed(format!("template '{name}' is not built yet"))),
            (BuildSource::Sandbox(_), _) => {
                let message = format!("'{name}' is a snapshot of a sandbox; templates are built from templates and images");
                return Err(part.failed(message));
            }
        }
        self.announce(&part, &build.origin, Cache::Use);
        self.hold(&part, &build.layers)?;
        self.base_layers = build.layers.len();
        self.state = State { layers: build.layers, env: build.env, user: build.user, workdir: build.workdir, pending: Vec::new() };
        Ok(Commands { start: build.start_command, ready: build.ready_command })
    }

    async fn base_image(&mut self, request: &ImageRequest) -> Result<(), BuildFailure> {
        let part = Part::of(BASE, format!("FROM {}", request.reference));
        let progress = |line: &str| self.log.say_of(BASE, LogLevel::Info, format!("[{BASE}] {line}"));
        let image = image::resolve(request, &self.means.config, &progress).await.map_err(|error| part.broke(&error))?;
        self.hold(&part, &image.layers)?;
        let layers = each_once(image.layers);
        self.base_layers = layers.len();
        self.state = State { layers, env: image.env, user: "root".into(), workdir: String::new(), pending: Vec::new() };
        self.in_sandbox(&part, Work::AsRoot(PROVISION_SCRIPT), &(image.digest, PROVISION_SCRIPT), Cache::Use).await?;
        // As on E2B, whatever user and folder the image names; its variables are kept.
        self.state.user = DEFAULT_USER.to_owned();
        Ok(())
    }

    /// Keeps layers from the collector until this build's row names them.
    fn hold(&mut self, part: &Part, layers: &[String]) -> Result<(), BuildFailure> {
        for id in layers {
            let lease = Lease::take(&self.means.config.data_dir, id).map_err(|error| part.broke(&error))?;
            self.held.push(lease.ok_or_else(|| part.failed(format!("layer {id} of its base is gone; build the base again")))?);
        }
        Ok(())
    }

    // ------------------------------------------------------------ steps

    async fn step(&mut self, number: usize, part: &Part, instruction: &Instruction) -> Result<(), BuildFailure> {
        let work = match instruction {
            Instruction::Run { script, user } => Work::Run { script, user: user.as_deref() },
            Instruction::Copy(copy) => Work::Copy(copy),
            Instruction::Env(_) | Instruction::Workdir(_) | Instruction::User { .. } => {
                return self.setting(number, part, instruction).await;
            }
        };
        self.in_sandbox(part, work, instruction, self.cache).await
    }

    /// Remembered only so that the log can say that nothing is new.
    async fn setting(&mut self, number: usize, part: &Part, instruction: &Instruction) -> Result<(), BuildFailure> {
        let key = self.state.key(instruction);
        let is_known = self.cached(part, &key).await?.is_some();
        let cache = if is_known { self.cache } else { Cache::Skip };
        self.announce(part, &key, cache);
        let data_dir = self.means.config.data_dir.clone();
        let applied = self.state.apply(instruction, number, &data_dir);
        applied.map_err(|error| part.broke(&error))?;
        if is_known { Ok(()) } else { self.remember(part, key, None).await }
    }

    /// Does the work and the errands before it in one sandbox, unless the cache has what comes of it.
    async fn in_sandbox(&mut self, part: &Part, work: Work<'_>, what: &impl serde::Serialize, cache: Cache) -> Result<(), BuildFailure> {
        let key = self.state.key(what);
        if cache == Cache::Use
            && let Some(layer) = self.cached(part, &key).await?
        {
            self.announce(part, &key, Cache::Use);
            return self.stack(part, layer).await;
        }
        self.announce(part, &key, Cache::Skip);
        let layer = self.layer_of(part, work).await?;
        self.remember(part, key, layer.as_ref().map(|layer| layer.id().to_owned())).await?;
        self.stack(part, layer).await
    }

    /// Puts a step's layer on top. When there are many, those of the steps become one.
    async fn stack(&mut self, part: &Part, layer: Option<Lease>) -> Result<(), BuildFailure> {
        let id = layer.as_ref().map(|layer| layer.id().to_owned());
        if self.state.layers.iter().take(self.base_layers).any(|known| Some(known) == id.as_ref()) {
            self.base_layers -= 1;
        }
        self.state.done(id);
        self.held.extend(layer);
        if self.state.layers.len() <= LAYERS_MAX {
            return Ok(());
        }
        // A base that is itself that high gives way, too.
        let kept = if self.base_layers < LAYERS_MAX / 2 { self.base_layers } else { 0 };
        let key = self.state.key(&("merge", kept));
        let one = match self.cached(part, &key).await? {
            Some(Some(one)) => one,
            Some(None) | None => {
                let (data_dir, layers) = (self.means.config.data_dir.clone(), self.state.layers[kept..].to_vec());
                let limits = self.means.config.limits;
                let merged = tokio::task::spawn_blocking(move || merge::merged(&data_dir, &layers, limits)).await;
                let one = merged.map_err(|panicked| part.broke(&panicked))?.map_err(|error| part.broke(&error))?;
                self.remember(part, key, Some(one.id().to_owned())).await?;
                one
            }
        };
        self.state.layers.truncate(kept);
        self.state.layers.push(one.id().to_owned());
        self.base_layers = kept;
        self.held.push(one);
        Ok(())
    }

    /// What steps at the end left to do.
    async fn run_errands_left(&mut self) -> Result<(), BuildFailure> {
        let Some(step) = self.state.pending.last().map(|errand| errand.step) else { return Ok(()) };
        let part = Part { step: step.to_string(), ..Part::of(FINALIZE, "applying settings") };
        self.in_sandbox(&part, Work::Errands, &FINALIZE, self.cache).await
    }

    fn announce(&self, part: &Part, key: &str, cache: Cache) {
        let cached = match cache {
            Cache::Use => "CACHED ",
            Cache::Skip => "",
        };
        let short: String = key.chars().take(12).collect();
        self.log.say_of(&part.step, LogLevel::Info, format!("{cached}[{}] {} [{short}]", part.prefix, part.shown));
    }

    /// What an earlier build made, if it is still there.
    async fn cached(&self, part: &Part, key: &str) -> Result<Option<Option<Lease>>, BuildFailure> {
        let (key, now) = (key.to_owned(), OffsetDateTime::now_utc());
        let found = self.means.store.write(move |db| builds::cached_step(db, &key, now)).await;
        let found = found.map_err(|error| part.broke(&error))?;
        match found {
            None => Ok(None),
            Some(None) => Ok(Some(None)),
            Some(Some(id)) => {
                let held = Lease::take(&self.means.config.data_dir, &id).map_err(|error| part.broke(&error))?;
                Ok(held.map(Some))
            }
        }
    }

    async fn remember(&self, part: &Part, key: String, layer: Option<String>) -> Result<(), BuildFailure> {
        let now = OffsetDateTime::now_utc();
        let written = self.means.store.write(move |db| builds::remember_step(db, &key, layer.as_deref(), now));
        written.await.map_err(|error| part.broke(&error))
    }

    // ------------------------------------------------------------ sandboxes

    async fn layer_of(&self, part: &Part, work: Work<'_>) -> Result<Option<Lease>, BuildFailure> {
        // Its user may be one that an errand has yet to make.
        let so_far = BuildRecord { user: "root".into(), workdir: String::new(), ..self.record_so_far() };
        let opened = self.means.registry.open_workshop(WorkshopRequest { build: so_far }).await;
        let mut workshop = opened.map_err(|error| part.broke(&error))?;
        let done = tokio::time::timeout(self.means.step_time_max, self.work(part, &workshop, work)).await;
        done.unwrap_or_else(|_| Err(part.failed(format!("step took longer than {:?} (build.step_time_max)", self.means.step_time_max))))?;
        let written = workshop.written().await.map_err(|error| part.broke(&error))?;
        let (data_dir, view, limits) = (self.means.config.data_dir.clone(), self.view(), self.means.config.limits);
        let harvested = tokio::task::spawn_blocking(move || harvest::layer_of(&data_dir, written.upper(), &view, limits)).await;
        workshop.remove().await;
        harvested.map_err(|panicked| part.broke(&panicked))?.map_err(|error| part.broke(&error))
    }

    fn view(&self) -> View {
        self.state.view(&self.means.config.data_dir)
    }

    async fn work(&self, part: &Part, workshop: &Workshop, work: Work<'_>) -> Result<(), BuildFailure> {
        for errand in &self.state.pending {
            self.run_errand(workshop, errand).await?;
        }
        match work {
            Work::Errands => Ok(()),
            Work::AsRoot(script) => {
                let command = Command { user: "root", cwd: "/", env: &self.state.env_of_commands(), script };
                self.run_quietly(part, workshop, command, "could not prepare the image").await
            }
            Work::Run { script, user } => self.run_step(part, workshop, script, user.unwrap_or(&self.state.user)).await,
            Work::Copy(copy) => self.copy(part, workshop, copy).await,
        }
    }

    async fn run_errand(&self, workshop: &Workshop, errand: &Errand) -> Result<(), BuildFailure> {
        let part = Part::of(&errand.step.to_string(), String::new());
        let command = Command { user: "root", cwd: "/", env: &errand.env, script: errand.script };
        let what = if errand.env.contains_key("NAME") { "failed to create user" } else { "failed to create workdir" };
        self.run_quietly(&part, workshop, command, what).await
    }

    async fn run_step(&self, part: &Part, workshop: &Workshop, script: &str, user: &str) -> Result<(), BuildFailure> {
        let mut output = Output::of(self.log, &part.step, &part.prefix);
        let env = self.state.env_of_commands();
        let command = Command { user, cwd: &self.state.workdir, env: &env, script };
        let ended = workshop.run(command, &mut |piece| output.add(piece)).await;
        drop(output);
        let failed = |why: String| part.failed(format!("failed to run command '{script}': {why}"));
        match ended {
            Ok(ended) if ended.code == 0 => Ok(()),
            Ok(ended) => Err(failed(ended.status)),
            Err(error @ ExecError::Refused { .. }) => Err(failed(format!("command failed: {error}"))),
            Err(error @ ExecError::Agent(_)) => Err(failed(chain(&error))),
        }
    }

    async fn copy(&self, part: &Part, workshop: &Workshop, copy: &Copy) -> Result<(), BuildFailure> {
        let archive = self.means.uploads.place(self.build.template, &copy.files_hash).map_err(|error| part.broke(&error))?;
        if !archive.exists() {
            return Err(part.failed(format!("the files of COPY {} were not uploaded (hash {})", copy.source, copy.files_hash)));
        }
        let flags = compression_flag(&archive).await.map_err(|error| part.broke(&error))?;
        workshop.put(&archive, ARCHIVE).await.map_err(|error| part.broke(&error))?;
        // Without a group chown takes the user's own.
        let owner = copy.owner.clone().unwrap_or_else(|| format!("{}:", self.state.user));
        let env = [
            ("ARCHIVE", ARCHIVE),
            ("UNPACKED", UNPACKED),
            ("TAR_FLAGS", flags),
            ("SOURCE", &copy.source),
            ("TARGET", &copy.target),
            ("OWNER", &owner),
            ("MODE", copy.mode.as_deref().unwrap_or_default()),
            ("WORKDIR", &self.state.workdir),
            ("USER_NAME", &self.state.user),
        ];
        let env: BTreeMap<String, String> = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let command = Command { user: "root", cwd: "/", env: &env, script: COPY_SCRIPT };
        self.run_quietly(part, workshop, command, "failed to copy files").await
    }

    /// Runs a script of ours; what it prints is of interest when it fails.
    async fn run_quietly(&self, part: &Part, workshop: &Workshop, command: Command<'_>, what: &str) -> Result<(), BuildFailure> {
        let mut told = Vec::new();
        let ended = workshop.run(command, &mut |piece| keep_end(&mut told, piece)).await;
        match ended {
            Ok(ended) if ended.code == 0 => Ok(()),
            Ok(ended) => {
                let told = String::from_utf8_lossy(&told);
                Err(part.failed(format!(
                    "{what}: {}",
                    [told.trim(), &ended.status].map(|text| text.to_owned()).join("; ").trim_matches([';', ' '])
                )))
            }
            Err(error) => Err(part.failed(format!("{what}: {}", chain(&error)))),
        }
    }

    // ------------------------------------------------------------ the end

    fn record_so_far(&self) -> BuildRecord {
        let state = self.state.clone();
        BuildRecord { layers: state.layers, env: state.env, user: state.user, workdir: state.workdir, ..self.build.clone() }
    }

    async fn finalize(&mut self, commands: Commands, begun: Instant) -> Result<(), BuildFailure> {
        let part = Part::of(FINALIZE, "Finalizing template build");
        let origin = self.state.key(&(&commands.start, &commands.ready));
        self.announce(&part, &origin, Cache::Skip);
        let record = BuildRecord { start_command: commands.start, ready_command: commands.ready, origin, ..self.record_so_far() };
        let row = record.clone();
        let failed = |error: StoreError| part.broke(&error);
        self.means.store.write(move |db| builds::set_result(db, &row)).await.map_err(failed)?;
        self.reach_ready_state(&part, record).await?;
        let took = begun.elapsed().as_secs_f64();
        self.log.say(LogLevel::Info, format!("Build finished, took {took:.1}s"));
        let (id, now) = (self.build.id, OffsetDateTime::now_utc());
        match self.means.store.write(move |db| builds::finish(db, id, now)).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(part.failed("the template was removed while it was built")),
            Err(error) => Err(part.broke(&error)),
        }
    }

    async fn reach_ready_state(&self, part: &Part, record: BuildRecord) -> Result<(), BuildFailure> {
        let witness = Told { log: self.log.clone(), output: Output::of(self.log, &part.step, "start") };
        match self.means.registry.reach_ready_state(record, Box::new(witness)).await {
            Ok(()) => Ok(()),
            Err(ReadyStateError::Commands { source, .. }) => Err(part.broke(&source)),
            Err(error @ ReadyStateError::Dump { .. }) => {
                let message = format!("its sandboxes will run the start command themselves: {}", chain(&error));
                self.log.say_of(FINALIZE, LogLevel::Warn, message);
                Ok(())
            }
        }
    }
}

/// Enough of a script's output to see why it failed.
fn keep_end(told: &mut Vec<u8>, piece: Printed<'_>) {
    const KEPT: usize = 2048;
    let (Printed::Stdout(bytes) | Printed::Stderr(bytes)) = piece;
    told.extend_from_slice(bytes);
    if told.len() > KEPT {
        told.drain(..told.len() - KEPT);
    }
}

/// gzip, or plain; clients write both.
async fn compression_flag(archive: &Path) -> std::io::Result<&'static str> {
    use tokio::io::AsyncReadExt;
    let mut magic = Vec::new();
    tokio::fs::File::open(archive).await?.take(2).read_to_end(&mut magic).await?;
    Ok(if magic == [0x1f, 0x8b] { "z" } else { "" })
}

/// Writes what start and ready command do into the log.
struct Told {
    log: BuildLog,
    output: Output,
}

impl Witness for Told {
    fn began(&mut self, what: &str) {
        self.log.say_of(FINALIZE, LogLevel::Info, what);
    }

    fn start_printed(&mut self, piece: Printed<'_>) {
        self.output.add(piece);
    }
}
