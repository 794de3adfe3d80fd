//! What a sandbox does next: a pure queue. Whoever asks for a verb is told whether to wait for its end (accepted), that
//! it is so already (ignored), or why not (denied). The driver runs one verb at a time and reports each end.
//!
//! ```text
//!  ask ──> Wait(ticket) ──> waiting ──next──> Run ──ended──> settled phase
//!   │                          │
//!   ├──> Already               └──next──> Moot (a verb before it failed and made it pointless)
//!   └──> Denied                └──kill──> revoked
//! ```
//! Rules, each with its test below: never two verbs at once; kill is always accepted and is the next to run; everybody
//! who waits is told an end; who asks for what is under way already shares its end.

use crate::model::{Keep, SandboxState};
use std::collections::VecDeque;

/// Verbs that may wait behind the one under way. Each of them has callers that hold a connection open.
const WAITING_MAX: usize = 16;

/// Where a sandbox stands when nothing is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// With processes.
    Running,
    /// Without; files and perhaps memory on disk.
    Paused,
    /// Killed or failed.
    Gone,
}

/// What a driver can do, one at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// Give it processes for the first time; under way from the beginning, never asked for.
    Start,
    /// Take its processes away, keeping what is named.
    Pause(Keep),
    /// Give them back.
    Resume,
    /// Make a dump of it (running) or hold it still (paused) for fork and snapshot.
    Copy,
    /// Replace its egress rules.
    Network,
    /// Remove it.
    Kill,
}

/// Names one verb of one sandbox; callers that share an end share the ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ticket(u64);

/// The answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Accepted, or shared: its end is the end of this verb.
    Wait(Ticket),
    /// Ignored: the sandbox is already so.
    Already,
    /// Not possible.
    Denied(Denied),
}

/// Why a verb is not possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// Killed, or being killed.
    Gone,
    /// Paused before.
    AlreadyPaused,
    /// Only a running one can.
    NotRunning,
    /// It is changing from one state to another.
    InTransition,
    /// [`WAITING_MAX`] verbs wait already.
    Busy,
}

/// What the driver does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Run this verb, then report its end.
    Run(Ticket, Verb),
    /// Tell those who wait that it is so already: what was asked for came to be in another way.
    Moot(Ticket, Answer),
}

/// How a verb ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// As asked.
    Done,
    /// Nothing changed: a failed pause runs on, a failed resume stays paused, a failed start leaves nothing.
    Failed,
}

/// The queue of one sandbox.
#[derive(Debug)]
pub(super) struct Queue {
    phase: Phase,
    under_way: Option<(Ticket, Verb)>,
    waiting: VecDeque<(Ticket, Verb)>,
    revoked: Vec<Ticket>,
    tickets: u64,
}

impl Queue {
    /// Of a sandbox that is being created: [`Verb::Start`] is under way.
    pub(super) fn starting() -> Self {
        let mut queue = Self::settled(Phase::Paused);
        let ticket = queue.ticket();
        queue.under_way = Some((ticket, Verb::Start));
        queue
    }

    /// Of a sandbox that an earlier server left in this phase.
    pub(super) fn settled(phase: Phase) -> Self {
        Self { phase, under_way: None, waiting: VecDeque::new(), revoked: Vec::new(), tickets: 0 }
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// Whether a kill was accepted: verbs that can be abandoned should be.
    pub(super) fn is_killing(&self) -> bool {
        self.planned().any(|(_, verb)| verb == Verb::Kill) || self.phase == Phase::Gone
    }

    /// Whether a verb is under way or waits.
    pub(super) fn is_busy(&self) -> bool {
        self.planned().next().is_some()
    }

    /// Where it stands, but for what is under way.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    fn planned(&self) -> impl DoubleEndedIterator<Item = (Ticket, Verb)> + '_ {
        self.under_way.iter().chain(&self.waiting).copied()
    }

    /// Where it will stand if all that is planned succeeds.
    fn projected(&self) -> Phase {
        self.planned().fold(self.phase, |phase, (_, verb)| verb.leads_to().unwrap_or(phase))
    }

    fn in_transition(&self) -> bool {
        self.planned().any(|(_, verb)| verb.leads_to().is_some())
    }

    fn latest(&self, is_it: impl Fn(Verb) -> bool) -> Option<Ticket> {
        self.planned().rev().find(|(_, verb)| is_it(*verb)).map(|(ticket, _)| ticket)
    }

    /// Asks for a verb. What is accepted will end, one way or another.
    pub(super) fn ask(&mut self, verb: Verb) -> Answer {
        match verb {
            Verb::Kill => self.ask_kill(),
            _ if self.is_killing() => Answer::Denied(Denied::Gone),
            Verb::Start => Answer::Already,
            Verb::Pause(_) => self.ask_pause(verb),
            Verb::Resume => self.ask_resume(),
            Verb::Copy if self.in_transition() => Answer::Denied(Denied::InTransition),
            Verb::Copy => self.accept(verb),
            Verb::Network if self.in_transition() => Answer::Denied(Denied::InTransition),
            Verb::Network if self.phase != Phase::Running => Answer::Denied(Denied::NotRunning),
            Verb::Network => self.accept(verb),
        }
    }

    fn ask_kill(&mut self) -> Answer {
        if self.phase == Phase::Gone {
            return Answer::Already;
        }
        if let Some(ticket) = self.latest(|verb| verb == Verb::Kill) {
            return Answer::Wait(ticket);
        }
        self.revoked.extend(self.waiting.drain(..).map(|(ticket, _)| ticket));
        let ticket = self.ticket();
        self.waiting.push_back((ticket, Verb::Kill));
        Answer::Wait(ticket)
    }

    fn ask_pause(&mut self, verb: Verb) -> Answer {
        match self.projected() {
            Phase::Running => self.accept(verb),
            Phase::Gone => Answer::Denied(Denied::Gone),
            Phase::Paused => match self.latest(|verb| matches!(verb, Verb::Pause(_))) {
                Some(ticket) => Answer::Wait(ticket),
                None => Answer::Denied(Denied::AlreadyPaused),
            },
        }
    }

    fn ask_resume(&mut self) -> Answer {
        match self.projected() {
            Phase::Paused => self.accept(Verb::Resume),
            Phase::Gone => Answer::Denied(Denied::Gone),
            Phase::Running => match self.latest(|verb| matches!(verb, Verb::Resume | Verb::Start)) {
                Some(ticket) => Answer::Wait(ticket),
                None => Answer::Already,
            },
        }
    }

    fn accept(&mut self, verb: Verb) -> Answer {
        if self.waiting.len() >= WAITING_MAX {
            return Answer::Denied(Denied::Busy);
        }
        let ticket = self.ticket();
        self.waiting.push_back((ticket, verb));
        Answer::Wait(ticket)
    }

    /// What to do next; `None` while a verb is under way or when nothing waits.
    pub(super) fn next(&mut self) -> Option<Step> {
        if self.under_way.is_some() {
            return None;
        }
        let (ticket, verb) = self.waiting.pop_front()?;
        match (verb, self.phase) {
            (Verb::Resume, Phase::Running) => Some(Step::Moot(ticket, Answer::Already)),
            (Verb::Pause(_), Phase::Paused) => Some(Step::Moot(ticket, Answer::Denied(Denied::AlreadyPaused))),
            (Verb::Network, Phase::Paused) => Some(Step::Moot(ticket, Answer::Denied(Denied::NotRunning))),
            (Verb::Kill, Phase::Gone) => Some(Step::Moot(ticket, Answer::Already)),
            (Verb::Start | Verb::Pause(_) | Verb::Resume | Verb::Copy | Verb::Network, Phase::Gone) => {
                Some(Step::Moot(ticket, Answer::Denied(Denied::Gone)))
            }
            (Verb::Start, Phase::Running | Phase::Paused)
            | (Verb::Pause(_), Phase::Running)
            | (Verb::Resume, Phase::Paused)
            | (Verb::Copy | Verb::Kill, Phase::Running | Phase::Paused)
            | (Verb::Network, Phase::Running) => {
                self.under_way = Some((ticket, verb));
                Some(Step::Run(ticket, verb))
            }
        }
    }

    /// The verb under way has ended.
    pub(super) fn ended(&mut self, how: Ended) {
        let Some((_, verb)) = self.under_way.take() else { return };
        match (how, verb) {
            (Ended::Done, _) => self.phase = verb.leads_to().unwrap_or(self.phase),
            // What was killed half-way is gone for its users; the next start sweeps what is left.
            (Ended::Failed, Verb::Start | Verb::Kill) => self.phase = Phase::Gone,
            (Ended::Failed, Verb::Pause(_) | Verb::Resume | Verb::Copy | Verb::Network) => {}
        }
    }

    /// Nothing was under way, and yet it stopped running: its memory was lost while a lazy restore filled it.
    pub(super) fn fell_back(&mut self) {
        if self.phase == Phase::Running && self.under_way.is_none() {
            self.phase = Phase::Paused;
        }
    }

    /// The ticket of the verb under way.
    pub(super) fn current(&self) -> Option<Ticket> {
        self.under_way.map(|(ticket, _)| ticket)
    }

    /// Tickets that a kill made pointless since the last call.
    pub(super) fn take_revoked(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.revoked)
    }
}

impl Verb {
    const fn leads_to(self) -> Option<Phase> {
        match self {
            Self::Start | Self::Resume => Some(Phase::Running),
            Self::Pause(_) => Some(Phase::Paused),
            Self::Kill => Some(Phase::Gone),
            Self::Copy | Self::Network => None,
        }
    }
}

impl Denied {
    /// The state to name in an error about a sandbox in `state`.
    pub(super) const fn state(self, state: SandboxState) -> SandboxState {
        match self {
            Self::AlreadyPaused => SandboxState::Paused,
            Self::Gone => SandboxState::Killed,
            Self::NotRunning | Self::InTransition | Self::Busy => state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAUSE: Verb = Verb::Pause(Keep::Memory);

    fn run_next(queue: &mut Queue) -> Verb {
        match queue.next() {
            Some(Step::Run(_, verb)) => verb,
            other => panic!("nothing to run: {other:?}"),
        }
    }

    #[test]
    fn a_pause_under_way_is_shared_and_a_paused_one_is_told_so() {
        let mut queue = Queue::settled(Phase::Running);
        let first = queue.ask(PAUSE);
        assert_eq!(run_next(&mut queue), PAUSE);
        assert_eq!(queue.ask(Verb::Pause(Keep::FilesOnly)), first);
        queue.ended(Ended::Done);
        assert_eq!(queue.ask(PAUSE), Answer::Denied(Denied::AlreadyPaused));
    }

    #[test]
    fn a_resume_waits_for_a_pause_under_way_and_all_callers_share_it() {
        let mut queue = Queue::settled(Phase::Running);
        queue.ask(PAUSE);
        assert_eq!(run_next(&mut queue), PAUSE);
        let resume = queue.ask(Verb::Resume);
        assert_eq!(queue.ask(Verb::Resume), resume);
        assert_eq!(queue.next(), None);
        queue.ended(Ended::Done);
        assert_eq!(run_next(&mut queue), Verb::Resume);
        assert_eq!(queue.ask(Verb::Resume), resume);
        queue.ended(Ended::Done);
        assert_eq!(queue.ask(Verb::Resume), Answer::Already);
    }

    #[test]
    fn a_resume_that_waited_for_a_failed_pause_finds_it_running() {
        let mut queue = Queue::settled(Phase::Running);
        queue.ask(PAUSE);
        run_next(&mut queue);
        let Answer::Wait(resume) = queue.ask(Verb::Resume) else { panic!("not accepted") };
        queue.ended(Ended::Failed);
        assert_eq!(queue.next(), Some(Step::Moot(resume, Answer::Already)));
    }

    #[test]
    fn copies_and_networks_are_denied_between_states() {
        let mut queue = Queue::settled(Phase::Running);
        queue.ask(PAUSE);
        run_next(&mut queue);
        assert_eq!(queue.ask(Verb::Copy), Answer::Denied(Denied::InTransition));
        assert_eq!(queue.ask(Verb::Network), Answer::Denied(Denied::InTransition));
        queue.ended(Ended::Done);
        assert!(matches!(queue.ask(Verb::Copy), Answer::Wait(_)));
        assert_eq!(queue.ask(Verb::Network), Answer::Denied(Denied::NotRunning));
    }

    #[test]
    fn a_kill_is_next_revokes_what_waits_and_denies_the_rest() {
        let mut queue = Queue::settled(Phase::Running);
        queue.ask(PAUSE);
        run_next(&mut queue);
        let Answer::Wait(resume) = queue.ask(Verb::Resume) else { panic!("not accepted") };
        let kill = queue.ask(Verb::Kill);
        assert_eq!(queue.take_revoked(), [resume]);
        assert_eq!(queue.ask(Verb::Kill), kill);
        assert_eq!(queue.ask(Verb::Resume), Answer::Denied(Denied::Gone));
        queue.ended(Ended::Done);
        assert_eq!(run_next(&mut queue), Verb::Kill);
        queue.ended(Ended::Done);
        assert_eq!(queue.ask(Verb::Kill), Answer::Already);
    }

    #[test]
    fn a_queue_that_is_full_says_so_and_still_takes_a_kill() {
        let mut queue = Queue::settled(Phase::Running);
        for _ in 0..WAITING_MAX {
            assert!(matches!(queue.ask(Verb::Copy), Answer::Wait(_)));
        }
        assert_eq!(queue.ask(Verb::Copy), Answer::Denied(Denied::Busy));
        assert!(matches!(queue.ask(Verb::Kill), Answer::Wait(_)));
    }

    #[derive(Debug, Clone)]
    enum Event {
        Ask(Verb),
        End(Ended),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => prop_oneof![Just(PAUSE), Just(Verb::Pause(Keep::FilesOnly)), Just(Verb::Resume), Just(Verb::Copy), Just(Verb::Network)]
                .prop_map(Event::Ask),
            1 => Just(Event::Ask(Verb::Kill)),
            4 => prop_oneof![3 => Just(Ended::Done), 1 => Just(Ended::Failed)].prop_map(Event::End),
        ]
    }

    proptest! {
        #[test]
        fn one_verb_at_a_time_kill_wins_and_everybody_is_answered(
            start in prop_oneof![Just(None), Just(Some(Phase::Running)), Just(Some(Phase::Paused))],
            events in proptest::collection::vec(event(), 0..80),
        ) {
            let mut queue = start.map_or_else(Queue::starting, Queue::settled);
            let (mut owed, mut running, mut killed) = (BTreeSet::new(), queue.current(), false);
            for event in events.into_iter().chain(std::iter::repeat_n(Event::End(Ended::Done), 100)) {
                match event {
                    Event::Ask(verb) => {
                        let answer = queue.ask(verb);
                        if verb == Verb::Kill {
                            prop_assert!(!matches!(answer, Answer::Denied(_)), "a kill was denied");
                            killed = true;
                        } else if killed {
                            prop_assert_eq!(answer, Answer::Denied(Denied::Gone));
                        }
                        if let Answer::Wait(ticket) = answer {
                            owed.insert(ticket);
                        }
                    }
                    Event::End(how) => {
                        if let Some(ticket) = running.take() {
                            owed.remove(&ticket);
                            queue.ended(how);
                        }
                    }
                }
                for ticket in queue.take_revoked() {
                    prop_assert!(owed.remove(&ticket), "revoked what nobody waits for");
                }
                while let Some(step) = queue.next() {
                    match step {
                        Step::Moot(ticket, _) => { owed.remove(&ticket); }
                        Step::Run(ticket, verb) => {
                            prop_assert!(running.is_none(), "two verbs at once");
                            prop_assert!(!killed || verb == Verb::Kill, "{:?} ran after a kill", verb);
                            running = Some(ticket);
                        }
                    }
                }
            }
            prop_assert!(owed.is_empty(), "somebody waits forever: {owed:?}");
            prop_assert_eq!((queue.current(), queue.waiting.len()), (None, 0));
        }
    }
}
