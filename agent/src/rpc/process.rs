//! process.Process: translates between the wire's messages and `crate::process`.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures_util::stream::{self, Stream, StreamExt as _};
use rustix::process::Signal;
use tokio::time::{Instant, sleep_until};

use super::proto::process as wire;
use super::proto::process::process_event::{DataEvent, EndEvent, Event, StartEvent, data_event};
use super::{keepalive_interval, user};
use crate::process::exit::Exit;
use crate::process::input::InputError;
use crate::process::output::{Chunk, OutputEvent, Source, Subscription};
use crate::process::spawn::{ProcessConfig, Size, SpawnError, Stdin, Terminal};
use crate::process::{self, Live, Process, Selector, Start};
use crate::state::Agent;

/// For a PTY whose request names no size.
const SIZE_DEFAULT: Size = Size { cols: 80, rows: 24 };

#[derive(Debug)]
pub(super) struct ProcessService {
    agent: Arc<Agent>,
}

impl ProcessService {
    pub(super) fn new(agent: Arc<Agent>) -> Arc<ProcessService> {
        Arc::new(ProcessService { agent })
    }

    fn running(&self, selector: Option<&wire::ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        Ok(self.agent.processes.find_running(parse_selector(selector)?)?)
    }

    fn live(&self, selector: Option<&wire::ProcessSelector>) -> Result<Arc<Live>, ConnectError> {
        let selector = parse_selector(selector)?;
        let process = self.agent.processes.find_running(selector.clone())?;
        Ok(process.live().ok_or(selector)?)
    }
}

impl wire::Process for ProcessService {
    async fn list<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListResponse> + Send + use<'a>> {
        let processes = self.agent.processes.running().iter().map(|process| info(process)).collect();
        Response::ok(wire::ListResponse { processes, ..Default::default() })
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::StartResponse> + Send + use<>>> {
        let identity = self.agent.identity();
        let user = user(&identity, &ctx)?;
        let deadline = ctx.deadline().map(Instant::from_std);
        let start = parse_start(request.to_owned_message(), deadline)?;
        let (process, subscription) = process::start(&self.agent, &identity, &user, start)?;
        let events = events(&process, subscription, keepalive_interval(ctx.headers()), deadline);
        Response::stream_ok(events.map(|event| Ok(wire::StartResponse { event: event?.into(), ..Default::default() })))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::ConnectResponse> + Send + use<>>> {
        let selector = parse_selector(request.to_owned_message().process.as_option())?;
        let process = self.agent.processes.find(selector)?;
        let deadline = ctx.deadline().map(Instant::from_std);
        let events = events(&process, process.subscribe(), keepalive_interval(ctx.headers()), deadline);
        Response::stream_ok(events.map(|event| Ok(wire::ConnectResponse { event: event?.into(), ..Default::default() })))
    }

    async fn update<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<impl Encodable<wire::UpdateResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let live = self.live(request.process.as_option())?;
        if let Some(size) = request.pty.as_option().and_then(|pty| pty.size.as_option()) {
            live.input.resize(parse_size(size)?)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input<'a>(
        &'a self,
        _ctx: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<wire::StreamInputResponse> + Send + use<'a>> {
        use wire::stream_input_request::Event;
        let mut live = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(Event::Start(start)) => live = Some(self.live(start.process.as_option())?),
                Some(Event::Data(data)) => {
                    let live: &Arc<Live> = live
                        .as_ref()
                        .ok_or_else(|| ConnectError::invalid_argument("input came before the start event that names its process"))?;
                    write_input(live, data.input.into_option()).await?;
                }
                Some(Event::Keepalive(_)) => {}
                None => return Err(ConnectError::invalid_argument("event is not set")),
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<impl Encodable<wire::SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let live = self.live(request.process.as_option())?;
        write_input(&live, request.input.into_option()).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<wire::SendSignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGTERM) => Signal::TERM,
            Some(wire::Signal::SIGNAL_SIGKILL) => Signal::KILL,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(ConnectError::unimplemented(format!("invalid signal: {:?}", request.signal)));
            }
        };
        process.send_signal(signal).map_err(|error| ConnectError::internal(format!("error sending signal: {error}")))?;
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<wire::CloseStdinResponse> + Send + use<'a>> {
        self.live(request.to_owned_message().process.as_option())?.input.close().await?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

fn parse_start(request: wire::StartRequest, deadline: Option<Instant>) -> Result<Start, ConnectError> {
    let config = request.process.into_option().unwrap_or_default();
    let terminal = match request.pty.as_option() {
        Some(pty) => Terminal::Pty(pty.size.as_option().map_or(Ok(SIZE_DEFAULT), parse_size)?),
        None if request.stdin.unwrap_or(true) => Terminal::Pipes { stdin: Stdin::Open },
        None => Terminal::Pipes { stdin: Stdin::Null },
    };
    let config = ProcessConfig { cmd: config.cmd, args: config.args, envs: config.envs.into_iter().collect(), cwd: config.cwd };
    Ok(Start { config, terminal, tag: request.tag, deadline })
}

fn parse_size(size: &wire::pty::Size) -> Result<Size, ConnectError> {
    let fit = |name: &str, value: u32| {
        u16::try_from(value).map_err(|_| ConnectError::invalid_argument(format!("pty size {name} is {value}; the limit is {}", u16::MAX)))
    };
    Ok(Size { cols: fit("cols", size.cols)?, rows: fit("rows", size.rows)? })
}

fn parse_selector(selector: Option<&wire::ProcessSelector>) -> Result<Selector, ConnectError> {
    use wire::process_selector::Selector as Wire;
    match selector.and_then(|selector| selector.selector.as_ref()) {
        Some(Wire::Pid(pid)) => Ok(Selector::Pid(*pid)),
        Some(Wire::Tag(tag)) => Ok(Selector::Tag(tag.clone())),
        None => Err(ConnectError::invalid_argument("process selector is not set; give a pid or a tag")),
    }
}

async fn write_input(live: &Live, input: Option<wire::ProcessInput>) -> Result<(), ConnectError> {
    use wire::process_input::Input;
    match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => Ok(live.input.write_stdin(&bytes).await?),
        Some(Input::Pty(bytes)) => Ok(live.input.write_pty(&bytes).await?),
        None => Err(ConnectError::invalid_argument("input is not set; give stdin or pty")),
    }
}

fn info(process: &Process) -> wire::ProcessInfo {
    let config = wire::ProcessConfig {
        cmd: process.config.cmd.clone(),
        args: process.config.args.clone(),
        envs: process.config.envs.clone().into_iter().collect(),
        cwd: process.config.cwd.clone(),
        ..Default::default()
    };
    wire::ProcessInfo { config: config.into(), pid: process.pid, tag: process.tag.clone(), ..Default::default() }
}

/// What a client of Start or Connect is sent. Ends after the end event, or with an error at the client's deadline.
fn events(
    process: &Process,
    subscription: Subscription,
    keepalive: Duration,
    deadline: Option<Instant>,
) -> impl Stream<Item = Result<wire::ProcessEvent, ConnectError>> + use<> {
    let start = event(Event::Start(Box::new(StartEvent { pid: process.pid, ..Default::default() })));
    let rest = stream::unfold(Some(subscription), move |subscription| async move {
        let mut subscription = subscription?;
        let silence = Instant::now().checked_add(keepalive);
        // All arms are cancel-safe; the deadline goes first, since the process that it kills ends at the same moment.
        tokio::select! {
            biased;
            () = at(deadline) => Some((Err(ConnectError::deadline_exceeded("the command's timeout has passed")), None)),
            next = subscription.next() => match next? {
                OutputEvent::Chunk(chunk) => Some((Ok(event(data(chunk))), Some(subscription))),
                OutputEvent::End(exit) => Some((Ok(event(end(exit))), None)),
            },
            () = at(silence) => Some((Ok(event(Event::Keepalive(Box::default()))), Some(subscription))),
        }
    });
    stream::once(std::future::ready(Ok(start))).chain(rest)
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

fn event(event: Event) -> wire::ProcessEvent {
    wire::ProcessEvent { event: Some(event), ..Default::default() }
}

fn data(chunk: Chunk) -> Event {
    let bytes = chunk.bytes.to_vec();
    let output = match chunk.source {
        Source::Stdout => data_event::Output::Stdout(bytes),
        Source::Stderr => data_event::Output::Stderr(bytes),
        Source::Pty => data_event::Output::Pty(bytes),
    };
    Event::Data(Box::new(DataEvent { output: Some(output), ..Default::default() }))
}

fn end(exit: Exit) -> Event {
    let status = exit.status();
    let error = (exit != Exit::Code(0)).then(|| status.clone());
    Event::End(Box::new(EndEvent { exit_code: exit.code(), exited: exit.is_normal(), status, error, ..Default::default() }))
}

impl From<Selector> for ConnectError {
    fn from(selector: Selector) -> ConnectError {
        ConnectError::not_found(selector.to_string())
    }
}

impl From<InputError> for ConnectError {
    fn from(error: InputError) -> ConnectError {
        match error {
            InputError::NoStdin | InputError::StdinOfPty | InputError::NoPty | InputError::Write(_) => {
                ConnectError::internal(error.to_string())
            }
            InputError::CloseOfPty => ConnectError::failed_precondition(error.to_string()),
        }
    }
}

impl From<SpawnError> for ConnectError {
    fn from(error: SpawnError) -> ConnectError {
        let exhausted = match &error {
            // Limits of processes, memory, open files and terminals: the same request may work later.
            SpawnError::Exec { source, .. } | SpawnError::Pty(source) | SpawnError::Pipes(source) => {
                matches!(source.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC))
            }
            SpawnError::NoCommand | SpawnError::Nul | SpawnError::EnvName { .. } | SpawnError::Path(_) => false,
            SpawnError::CwdMissing { .. } | SpawnError::CwdNotDirectory { .. } | SpawnError::NotFound { .. } => false,
        };
        match exhausted {
            true => ConnectError::resource_exhausted(error.to_string()),
            false => ConnectError::invalid_argument(error.to_string()),
        }
    }
}
