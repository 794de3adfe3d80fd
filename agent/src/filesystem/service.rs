//! The Filesystem service on the wire: requests to verbs, entries and events to messages, errors to codes.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use buffa::MessageField;
use buffa_types::google::protobuf::Timestamp;
use connectrpc::{ConnectError, ErrorCode, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures_util::Stream;

use super::entry::{Entry, Kind};
use super::ops::{self, EnsureError, ListError, MakeDirError, MoveError, Owner, RemoveError, StatError};
use super::watch::{Depth, EventKind, NetworkMounts, WatchError};
use super::watchers::{Change, Entries, Options, Subscription, WatcherError};
use crate::blocking;
use crate::files::describe;
use crate::memory;
use crate::paths;
use crate::rpc;
use crate::rpc::proto::filesystem::__buffa::oneof::watch_dir_response::Event;
use crate::rpc::proto::filesystem::watch_dir_response::{KeepAlive, StartEvent};
use crate::rpc::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, EntryInfo, EventType, FileType, Filesystem, FilesystemEvent, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest, MoveResponse, RemoveRequest,
    RemoveResponse, RemoveWatcherRequest, RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};
use crate::state::Agent;
use crate::users::{Names, User};

#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) agent: Arc<Agent>,
}

/// Who asks, and where paths start for them.
struct Asker {
    user: User,
    default_workdir: String,
}

impl Asker {
    fn resolve(&self, path: &str) -> Result<PathBuf, ConnectError> {
        Ok(paths::resolve(path, &self.user, &self.default_workdir)?)
    }

    fn owner(&self) -> Owner {
        Owner { uid: self.user.uid, gid: self.user.gid }
    }
}

impl Service {
    fn asker(&self, ctx: &RequestContext) -> Result<Asker, ConnectError> {
        let identity = self.agent.identity();
        Ok(Asker { user: rpc::user(&identity, ctx)?, default_workdir: identity.default_workdir.clone() })
    }

    /// After directories were made or moved: recursive watchers see them before the client hears of them.
    async fn changed<T, E>(&self, work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ConnectError>
    where
        T: Send + 'static,
        E: Into<ConnectError> + Send + 'static,
    {
        let agent = Arc::clone(&self.agent);
        let and_settle = move || {
            let result = work();
            agent.watchers.settle();
            result
        };
        run(and_settle).await
    }
}

async fn run<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ConnectError>
where
    T: Send + 'static,
    E: Into<ConnectError> + Send + 'static,
{
    match blocking::run(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(lost) => Err(ConnectError::internal(lost.to_string())),
    }
}

#[expect(refining_impl_trait, reason = "the answers are owned messages, which the generated trait spells as a bound")]
impl Filesystem for Service {
    async fn stat(&self, ctx: RequestContext, request: ServiceRequest<'_, StatRequest>) -> ServiceResult<StatResponse> {
        let path = self.asker(&ctx)?.resolve(request.path)?;
        let entry = run(move || ops::stat(&path, &Names::read())).await?;
        Response::ok(StatResponse { entry: message(entry), ..Default::default() })
    }

    async fn make_dir(&self, ctx: RequestContext, request: ServiceRequest<'_, MakeDirRequest>) -> ServiceResult<MakeDirResponse> {
        let asker = self.asker(&ctx)?;
        let path = asker.resolve(request.path)?;
        let entry = self.changed(move || ops::make_dir(&path, asker.owner(), &Names::read())).await?;
        Response::ok(MakeDirResponse { entry: message(entry), ..Default::default() })
    }

    async fn r#move(&self, ctx: RequestContext, request: ServiceRequest<'_, MoveRequest>) -> ServiceResult<MoveResponse> {
        let asker = self.asker(&ctx)?;
        let (from, to) = (asker.resolve(request.source)?, asker.resolve(request.destination)?);
        let entry = self.changed(move || ops::move_entry(&from, &to, asker.owner(), &Names::read())).await?;
        Response::ok(MoveResponse { entry: message(entry), ..Default::default() })
    }

    async fn list_dir(&self, ctx: RequestContext, request: ServiceRequest<'_, ListDirRequest>) -> ServiceResult<ListDirResponse> {
        let path = self.asker(&ctx)?.resolve(request.path)?;
        let depth = request.depth;
        let entries = run(move || ops::list_dir(&path, depth, &Names::read())).await?;
        let entries = entries.into_iter().map(EntryInfo::from).collect();
        memory::release_later();
        Response::ok(ListDirResponse { entries, ..Default::default() })
    }

    async fn remove(&self, ctx: RequestContext, request: ServiceRequest<'_, RemoveRequest>) -> ServiceResult<RemoveResponse> {
        let path = self.asker(&ctx)?.resolve(request.path)?;
        run(move || ops::remove(&path)).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let path = self.asker(&ctx)?.resolve(request.path)?;
        let options = options(request.recursive, request.include_entry, request.allow_network_mounts);
        let subscription = self.agent.watchers.subscribe(&path, options).await?;
        let keepalive = rpc::keepalive_interval(ctx.headers());
        Response::stream_ok(Feed::begin(subscription, keepalive, ctx.deadline()))
    }

    async fn create_watcher(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        let path = self.asker(&ctx)?.resolve(request.path)?;
        let options = options(request.recursive, request.include_entry, request.allow_network_mounts);
        let watcher_id = self.agent.watchers.create(&path, options).await?;
        Response::ok(CreateWatcherResponse { watcher_id, ..Default::default() })
    }

    async fn get_watcher_events(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        let changes = self.agent.watchers.take(request.watcher_id).await?;
        let events = changes.into_iter().map(FilesystemEvent::from).collect();
        Response::ok(GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        self.agent.watchers.remove(request.watcher_id)?;
        Response::ok(RemoveWatcherResponse::default())
    }
}

/// The wire's three flags, each given its meaning.
#[expect(clippy::fn_params_excessive_bools, reason = "they come from the wire one by one")]
fn options(recursive: bool, include_entry: bool, allow_network_mounts: bool) -> Options {
    Options {
        depth: if recursive { Depth::Tree } else { Depth::Directory },
        entries: if include_entry { Entries::Include } else { Entries::Omit },
        mounts: if allow_network_mounts { NetworkMounts::Allow } else { NetworkMounts::Refuse },
    }
}

/// What a WatchDir stream still owes its client.
struct Feed {
    subscription: Subscription,
    owed: VecDeque<WatchDirResponse>,
    keepalive: Duration,
    deadline: Option<Instant>,
}

impl Feed {
    /// `start`, then every change as it happens, keepalives in silence, and an error at the end if there is one.
    fn begin(
        subscription: Subscription,
        keepalive: Duration,
        deadline: Option<Instant>,
    ) -> impl Stream<Item = Result<WatchDirResponse, ConnectError>> {
        let owed = VecDeque::from([response(StartEvent::default())]);
        let feed = Feed { subscription, owed, keepalive, deadline };
        futures_util::stream::unfold(Some(feed), |feed| async {
            let mut feed = feed?;
            match feed.next().await {
                Ok(response) => Some((Ok(response), Some(feed))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<WatchDirResponse, ConnectError> {
        loop {
            if let Some(response) = self.owed.pop_front() {
                return Ok(response);
            }
            // Cancel-safe, all three: changes stay queued in the subscription, and the others only wait.
            tokio::select! {
                changes = self.subscription.next() => {
                    self.owed = changes?.into_iter().map(|change| response(FilesystemEvent::from(change))).collect();
                }
                () = tokio::time::sleep(self.keepalive) => return Ok(response(KeepAlive::default())),
                () = until(self.deadline) => return Err(ConnectError::deadline_exceeded("the watch reached its timeout")),
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn response(event: impl Into<Event>) -> WatchDirResponse {
    WatchDirResponse { event: Some(event.into()), ..Default::default() }
}

fn message(entry: Entry) -> MessageField<EntryInfo, buffa::Inline<EntryInfo>> {
    MessageField::some(entry.into())
}

impl From<Entry> for EntryInfo {
    fn from(entry: Entry) -> EntryInfo {
        let file_type = match entry.kind {
            Kind::File => FileType::FILE_TYPE_FILE,
            Kind::Directory => FileType::FILE_TYPE_DIRECTORY,
            Kind::Other => FileType::FILE_TYPE_UNSPECIFIED,
        };
        let modified = Timestamp { seconds: entry.modified.seconds, nanos: entry.modified.nanos, ..Default::default() };
        EntryInfo {
            name: entry.name,
            r#type: file_type.into(),
            path: entry.path,
            size: entry.size,
            mode: entry.mode,
            permissions: entry.permissions,
            owner: entry.owner,
            group: entry.group,
            modified_time: MessageField::some(modified),
            is_symlink: entry.symlink_target.is_some(),
            symlink_target: entry.symlink_target,
            metadata: entry.metadata.into_iter().collect(),
            ..Default::default()
        }
    }
}

impl From<Change> for FilesystemEvent {
    fn from(change: Change) -> FilesystemEvent {
        let event_type = match change.kind {
            EventKind::Create => EventType::EVENT_TYPE_CREATE,
            EventKind::Write => EventType::EVENT_TYPE_WRITE,
            EventKind::Remove => EventType::EVENT_TYPE_REMOVE,
            EventKind::Rename => EventType::EVENT_TYPE_RENAME,
            EventKind::Chmod => EventType::EVENT_TYPE_CHMOD,
        };
        let entry = change.entry.map_or_else(MessageField::none, message);
        FilesystemEvent { name: change.name, r#type: event_type.into(), entry, ..Default::default() }
    }
}

/// The code of a system call's failure that has no better name.
fn io_code(error: &io::Error) -> ErrorCode {
    match error.kind() {
        io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput => ErrorCode::InvalidArgument,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::PermissionDenied,
        _ => ErrorCode::Internal,
    }
}

impl From<StatError> for ConnectError {
    fn from(error: StatError) -> ConnectError {
        let code = match &error {
            StatError::NotFound { .. } => ErrorCode::NotFound,
            StatError::Io { source, .. } => io_code(source),
        };
        ConnectError::new(code, describe(&error))
    }
}

impl From<ListError> for ConnectError {
    fn from(error: ListError) -> ConnectError {
        let code = match &error {
            ListError::NotFound { .. } => ErrorCode::NotFound,
            ListError::NotDirectory { .. } => ErrorCode::InvalidArgument,
            ListError::LinkLoop { .. } => ErrorCode::FailedPrecondition,
            ListError::TooMany { .. } => ErrorCode::OutOfRange,
            ListError::Io { source, .. } => io_code(source),
        };
        ConnectError::new(code, describe(&error))
    }
}

impl From<MakeDirError> for ConnectError {
    fn from(error: MakeDirError) -> ConnectError {
        let code = match &error {
            MakeDirError::Exists { .. } => ErrorCode::AlreadyExists,
            MakeDirError::NotDirectory { .. } => ErrorCode::InvalidArgument,
            MakeDirError::Ensure(error) => ensure_code(error),
            MakeDirError::Stat(_) => ErrorCode::Internal,
        };
        ConnectError::new(code, describe(&error))
    }
}

fn ensure_code(error: &EnsureError) -> ErrorCode {
    match error {
        EnsureError::File { .. } => ErrorCode::InvalidArgument,
        EnsureError::Io { source, .. } => io_code(source),
    }
}

impl From<MoveError> for ConnectError {
    fn from(error: MoveError) -> ConnectError {
        let code = match &error {
            MoveError::NotFound { .. } => ErrorCode::NotFound,
            MoveError::Refused { .. } => ErrorCode::InvalidArgument,
            MoveError::Ensure(error) => ensure_code(error),
            MoveError::Io { source, .. } => io_code(source),
            MoveError::Relocate(_) | MoveError::Stat(_) => ErrorCode::Internal,
        };
        ConnectError::new(code, describe(&error))
    }
}

impl From<RemoveError> for ConnectError {
    fn from(error: RemoveError) -> ConnectError {
        ConnectError::new(io_code(&error.source), describe(&error))
    }
}

impl From<WatcherError> for ConnectError {
    fn from(error: WatcherError) -> ConnectError {
        match &error {
            WatcherError::Watch(watch) => ConnectError::new(watch_code(watch), describe(watch.as_ref())),
            WatcherError::Overflow => ConnectError::data_loss(error.to_string()),
            WatcherError::TooMany => ConnectError::resource_exhausted(error.to_string()),
            WatcherError::Unknown { .. } => ConnectError::not_found(error.to_string()),
            WatcherError::Lost(_) | WatcherError::Random(_) => ConnectError::internal(describe(&error)),
        }
    }
}

fn watch_code(error: &WatchError) -> ErrorCode {
    match error {
        WatchError::NotFound { .. } => ErrorCode::NotFound,
        WatchError::NotDirectory { .. } | WatchError::NetworkMount { .. } => ErrorCode::InvalidArgument,
        WatchError::TooManyWatches { .. } | WatchError::TooManyInstances => ErrorCode::ResourceExhausted,
        WatchError::Overflow => ErrorCode::DataLoss,
        WatchError::Io { source, .. } => io_code(source),
    }
}
