//! What runs in the background, by id: started, listed, killed; and the list of everything that runs in the sandbox.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use serde_json::{Value, json};

use super::commands::timeout;
use super::error::{Code, HopxError};
use super::languages::Language;
use super::pieces::{self, Outcome};
use super::run::{self, Program, Running};
use crate::blocking;
use crate::logs::rfc3339;
use crate::process::Process;
use crate::state::Agent;

/// Ended jobs that are still listed.
const ENDED_MAX: usize = 100;
/// Of code in the background that names no timeout.
const TIMEOUT_DEFAULT_S: f64 = 300.0;
/// The agent is nobody's to kill.
const AGENT_PID: u32 = 1;

/// All jobs, oldest first.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    listed: Mutex<Listed>,
}

#[derive(Debug, Default)]
struct Listed {
    last_number: u64,
    jobs: VecDeque<Arc<Job>>,
}

/// How a new job is shown.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) name: String,
    pub(super) language: &'static str,
    pub(super) command: String,
}

#[derive(Debug)]
struct Job {
    id: String,
    new: NewJob,
    started_at: SystemTime,
    process: Arc<Process>,
    end: Mutex<Option<End>>,
}

#[derive(Debug, Clone)]
struct End {
    at: SystemTime,
    outcome: Outcome,
    took: Duration,
    /// By a request of this API.
    killed: bool,
}

/// `POST /execute/background`.
#[derive(Debug, Deserialize)]
pub(super) struct Background {
    code: String,
    language: Option<String>,
    timeout: Option<f64>,
    #[serde(alias = "working_dir")]
    workdir: Option<String>,
    env: Option<BTreeMap<String, String>>,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ByQuery {
    process_id: Option<String>,
}

/// Code in the background runs in a process of its own, apart from the kernel that `/execute` shares.
pub(super) async fn start(
    State(agent): State<Arc<Agent>>,
    request: Result<Json<Background>, JsonRejection>,
) -> Result<Json<Value>, HopxError> {
    let Json(request) = request?;
    let language = Language::named(request.language.as_deref())?;
    let timeout = timeout(request.timeout, TIMEOUT_DEFAULT_S)?;
    let workdir = run::workdir(&agent, request.workdir).await?;
    let program = language.program(request.code, workdir, request.env.unwrap_or_default(), timeout)?;
    let command = std::iter::once(&program.config.cmd).chain(&program.config.args).map(|word| word.chars().take(80).collect::<String>());
    let command = command.collect::<Vec<_>>().join(" ");
    let new = NewJob { name: request.name.unwrap_or_else(|| language.word().to_owned()), language: language.word(), command };
    Ok(Json(begin(&agent, program, new)?))
}

/// Starts a job and answers as both kinds of background requests do.
pub(super) fn begin(agent: &Arc<Agent>, program: Program, new: NewJob) -> Result<Value, HopxError> {
    let Running { process, pieces } = run::start(agent, program)?;
    let job = agent.hopx.jobs.add(new, process);
    let answer = json!({
        "process_id": job.id,
        "execution_id": job.id,
        "status": "running",
        "name": job.new.name,
        "pid": job.process.pid,
        "start_time": rfc3339(job.started_at),
        "started_at": rfc3339(job.started_at),
        "command": job.new.command,
        "message": "started in the background",
        "timestamp": rfc3339(SystemTime::now()),
    });
    tokio::spawn(async move {
        // Its output is in the sandbox's log; here it is only taken, so that the program never waits for a reader.
        if let Some(finished) = pieces::gather(pieces).await {
            job.end(finished.outcome, finished.took);
        }
    });
    Ok(answer)
}

pub(super) async fn list(State(agent): State<Arc<Agent>>) -> Json<Value> {
    Json(listed(agent.hopx.jobs.shown()))
}

/// Jobs first, then everything else that runs.
pub(super) async fn list_all(State(agent): State<Arc<Agent>>) -> Result<Json<Value>, HopxError> {
    let jobs = agent.hopx.jobs.shown();
    let known: Vec<u64> = jobs.iter().filter_map(|job| job["pid"].as_u64()).collect();
    let others = blocking::run(move || running_processes(&known)).await?;
    Ok(Json(listed(jobs.into_iter().chain(others).collect())))
}

fn listed(processes: Vec<Value>) -> Value {
    json!({ "count": processes.len(), "processes": processes, "timestamp": rfc3339(SystemTime::now()) })
}

pub(super) async fn kill(State(agent): State<Arc<Agent>>, Path(id): Path<String>) -> Result<Json<Value>, HopxError> {
    kill_one(&agent, &id)
}

pub(super) async fn kill_by_query(
    State(agent): State<Arc<Agent>>,
    query: Result<Query<ByQuery>, QueryRejection>,
) -> Result<Json<Value>, HopxError> {
    let Query(query) = query?;
    kill_one(&agent, &query.process_id.ok_or_else(|| HopxError::invalid("the query parameter process_id is required"))?)
}

/// Killing what has ended already is a success: the clients repeat what they had no answer to.
fn kill_one(agent: &Agent, id: &str) -> Result<Json<Value>, HopxError> {
    let killed = || {
        Json(json!({ "success": true, "process_id": id, "status": "killed", "message": "killed", "timestamp": rfc3339(SystemTime::now()) }))
    };
    if let Some(job) = agent.hopx.jobs.find(id) {
        job.kill();
        return Ok(killed());
    }
    let pid = id.strip_prefix("pid_").unwrap_or(id).parse().ok().filter(|pid| *pid > AGENT_PID);
    let sent = pid.and_then(|pid: u32| Pid::from_raw(i32::try_from(pid).ok()?)).map(|pid| kill_process(pid, Signal::KILL));
    match sent {
        Some(Ok(())) => Ok(killed()),
        Some(Err(_)) | None => Err(HopxError::new(Code::ProcessNotFound, format!("process '{id}' not found"))),
    }
}

impl Jobs {
    fn add(&self, new: NewJob, process: Arc<Process>) -> Arc<Job> {
        let mut listed = self.lock();
        listed.last_number += 1;
        let id = format!("proc_{}", listed.last_number);
        let job = Arc::new(Job { id, new, started_at: SystemTime::now(), process, end: Mutex::new(None) });
        listed.jobs.push_back(Arc::clone(&job));
        let ended = listed.jobs.iter().filter(|job| job.ended().is_some()).count();
        if ended > ENDED_MAX
            && let Some(oldest) = listed.jobs.iter().position(|job| job.ended().is_some())
        {
            listed.jobs.remove(oldest);
        }
        job
    }

    fn find(&self, id: &str) -> Option<Arc<Job>> {
        self.lock().jobs.iter().find(|job| job.id == id).cloned()
    }

    fn shown(&self) -> Vec<Value> {
        self.lock().jobs.iter().map(|job| job.shown()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    fn ended(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn end(&self, outcome: Outcome, took: Duration) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let killed = end.as_ref().is_some_and(|end| end.killed);
        *end = Some(End { at: SystemTime::now(), outcome, took, killed });
    }

    fn kill(&self) {
        if !self.process.is_running() {
            return;
        }
        let outcome = Outcome::Exited(crate::process::exit::Exit::Signal { number: 9, core_dumped: false });
        let took = self.started_at.elapsed().unwrap_or_default();
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(End { at: SystemTime::now(), outcome, took, killed: true });
        run::kill_group(&self.process);
    }

    fn shown(&self) -> Value {
        let end = self.ended();
        let status = match &end {
            None => "running",
            Some(End { killed: true, .. }) => "killed",
            Some(End { outcome, .. }) if outcome.is_success() => "completed",
            Some(End { outcome: Outcome::TimedOut(_), .. }) => "timeout",
            Some(_) => "failed",
        };
        let took = end.as_ref().map_or_else(|| self.started_at.elapsed().unwrap_or_default(), |end| end.took);
        let mut shown = json!({
            "process_id": self.id,
            "execution_id": self.id,
            "name": self.new.name,
            "status": status,
            "language": self.new.language,
            "command": self.new.command,
            "pid": self.process.pid,
            "start_time": rfc3339(self.started_at),
            "started_at": rfc3339(self.started_at),
            "duration": took.as_secs_f64(),
            "execution_time": took.as_secs_f64(),
        });
        if let Some(end) = end {
            shown["end_time"] = json!(rfc3339(end.at));
            shown["exit_code"] = json!(end.outcome.exit_code());
        }
        shown
    }
}

/// What /proc shows, without the agent, kernel threads and `known` ones. A process that ends meanwhile is left out.
fn running_processes(known: &[u64]) -> Vec<Value> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid > AGENT_PID && !known.contains(&u64::from(*pid))).filter_map(running_process).collect()
}

fn running_process(pid: u32) -> Option<Value> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
    let rss_kib: f64 = field("VmRSS:").and_then(|size| size.split(' ').next()?.parse().ok()).unwrap_or(0.0);
    let name = field("Name:")?;
    Some(json!({
        "process_id": format!("pid_{pid}"),
        "execution_id": null,
        "name": name,
        "status": "running",
        "state": field("State:"),
        "pid": pid,
        "ppid": field("PPid:").and_then(|ppid| ppid.parse::<u32>().ok()),
        "memory_mb": (rss_kib / 1024.0 * 100.0).round() / 100.0,
        "command": if command.is_empty() { name } else { &command },
        "start_time": fs::metadata(format!("/proc/{pid}")).and_then(|found| found.modified()).ok().map(rfc3339),
    }))
}
