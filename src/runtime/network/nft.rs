//! A small vocabulary over the `nftables` crate, so that rules read like rules, and the way into the kernel.

use nftables::batch::Batch;
use nftables::expr::{CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix, Range, SetItem};
use nftables::helper::{self, NftablesError};
use nftables::schema::{Chain, Element, FlushObject, NfCmd, NfListObject, Nftables, Rule, Set, SetFlag, SetType, SetTypeValue, Table};
use nftables::stmt::{self, JumpTarget, Match, Operator, Reject, RejectType, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook, RejectCode};
use std::collections::HashSet;
use std::io;
use std::net::Ipv4Addr;

pub(super) type Expr = Expression<'static>;
pub(super) type Stmt = Statement<'static>;

/// Changes to one table, applied all or none. Family `inet` throughout.
#[derive(Debug)]
pub(super) struct Transaction {
    table: String,
    batch: Batch<'static>,
}

/// Where a base chain hooks in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hook {
    pub(super) kind: NfChainType,
    pub(super) at: NfHook,
    pub(super) priority: i32,
    pub(super) policy: NfChainPolicy,
}

impl Transaction {
    /// Changes to a table as it is; made if it does not exist.
    pub(super) fn on(table: &str) -> Self {
        let mut batch = Batch::new();
        batch.add(NfListObject::Table(named_table(table)));
        Self { table: table.to_owned(), batch }
    }

    /// The table is replaced by what follows, without a moment in between.
    pub(super) fn anew(table: &str) -> Self {
        let mut transaction = Self::on(table);
        transaction.batch.delete(NfListObject::Table(named_table(table)));
        transaction.batch.add(NfListObject::Table(named_table(table)));
        transaction
    }

    /// The table is gone afterwards, whether it existed or not.
    pub(super) fn without(table: &str) -> Self {
        let mut transaction = Self::on(table);
        transaction.batch.delete(NfListObject::Table(named_table(table)));
        transaction
    }

    fn named_chain(&self, name: &str) -> Chain<'static> {
        Chain { family: NfFamily::INet, table: self.table.clone().into(), name: name.to_owned().into(), ..Chain::default() }
    }

    pub(super) fn chain(&mut self, name: &str) {
        let chain = self.named_chain(name);
        self.batch.add(NfListObject::Chain(chain));
    }

    pub(super) fn base_chain(&mut self, name: &str, hook: Hook) {
        let chain = Chain {
            _type: Some(hook.kind),
            hook: Some(hook.at),
            prio: Some(hook.priority),
            policy: Some(hook.policy),
            ..self.named_chain(name)
        };
        self.batch.add(NfListObject::Chain(chain));
    }

    pub(super) fn remove_chain(&mut self, name: &str) {
        let chain = self.named_chain(name);
        self.batch.delete(NfListObject::Chain(chain));
    }

    pub(super) fn flush_chain(&mut self, name: &str) {
        let chain = self.named_chain(name);
        self.batch.add_cmd(NfCmd::Flush(FlushObject::Chain(chain)));
    }

    pub(super) fn rule(&mut self, chain: &str, expr: Vec<Stmt>) {
        self.batch.add(NfListObject::Rule(Rule {
            family: NfFamily::INet,
            table: self.table.clone().into(),
            chain: chain.to_owned().into(),
            expr: expr.into(),
            ..Rule::default()
        }));
    }

    fn address_set_of(&self, name: &str) -> Box<Set<'static>> {
        Box::new(Set {
            family: NfFamily::INet,
            table: self.table.clone().into(),
            name: name.to_owned().into(),
            set_type: SetTypeValue::Single(SetType::Ipv4Addr),
            flags: Some(HashSet::from([SetFlag::Interval])),
            ..Set::default()
        })
    }

    /// A set of IPv4 blocks, made if it does not exist, holding exactly these. `elements` must not overlap.
    pub(super) fn address_set(&mut self, name: &str, elements: Vec<Expr>) {
        let set = self.address_set_of(name);
        self.batch.add(NfListObject::Set(set.clone()));
        self.batch.add_cmd(NfCmd::Flush(FlushObject::Set(set)));
        if !elements.is_empty() {
            self.batch.add(NfListObject::Element(Element {
                family: NfFamily::INet,
                table: self.table.clone().into(),
                name: name.to_owned().into(),
                elem: elements.into(),
            }));
        }
    }

    pub(super) fn into_ruleset(self) -> Nftables<'static> {
        self.batch.to_nftables()
    }

    /// Asks whether it would be taken, and changes nothing.
    pub(super) fn check(self) -> io::Result<()> {
        helper::apply_ruleset_with_args(&self.into_ruleset(), helper::DEFAULT_NFT, ["--check"]).map_err(into_io)
    }

    /// Puts it into the netns that the calling thread is in. Blocks for the 2 to 10 ms that `nft` takes.
    pub(super) fn apply(self) -> io::Result<()> {
        helper::apply_ruleset(&self.into_ruleset()).map_err(into_io)
    }
}

/// `nft`'s complaint in one line, the kind of error kept where it means something (`nft` missing: `NotFound`).
pub(super) fn into_io(error: NftablesError) -> io::Error {
    match error {
        NftablesError::NftExecution { inner, .. } => inner,
        NftablesError::NftFailed { stderr, .. } if stderr.contains("Operation not permitted") => {
            io::Error::new(io::ErrorKind::PermissionDenied, stderr.lines().next().unwrap_or_default().to_owned())
        }
        NftablesError::NftFailed { stderr, .. } => {
            io::Error::other(stderr.lines().next().unwrap_or("nft failed without a word").to_owned())
        }
        other => io::Error::other(other),
    }
}

fn named_table(name: &str) -> Table<'static> {
    Table { family: NfFamily::INet, name: name.to_owned().into(), handle: None }
}

pub(super) fn text(value: impl ToString) -> Expr {
    Expression::String(value.to_string().into())
}

fn meta(key: MetaKey) -> Expr {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn payload(protocol: &'static str, field: &'static str) -> Expr {
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(PayloadField { protocol: protocol.into(), field: field.into() })))
}

pub(super) fn source() -> Expr {
    payload("ip", "saddr")
}

pub(super) fn destination() -> Expr {
    payload("ip", "daddr")
}

pub(super) fn port_of(protocol: &'static str) -> Expr {
    payload(protocol, "dport")
}

pub(super) fn is(left: Expr, right: Expr) -> Stmt {
    Statement::Match(Match { left, right, op: Operator::EQ })
}

pub(super) fn is_not(left: Expr, right: Expr) -> Stmt {
    Statement::Match(Match { left, right, op: Operator::NEQ })
}

/// Matches any of several plain values.
pub(super) fn any_of(values: impl IntoIterator<Item = Expr>) -> Expr {
    Expression::Named(NamedExpression::Set(values.into_iter().map(SetItem::Element).collect()))
}

/// Refers to a named set of the same table.
pub(super) fn in_set(name: &str) -> Expr {
    text(format!("@{name}"))
}

/// A name, or with a trailing `*` all links whose names begin so.
pub(super) fn comes_from(link: &str) -> Stmt {
    is(meta(MetaKey::Iifname), text(link))
}

pub(super) fn goes_to(link: &str) -> Stmt {
    is(meta(MetaKey::Oifname), text(link))
}

pub(super) fn goes_elsewhere_than(link: &str) -> Stmt {
    is_not(meta(MetaKey::Oifname), text(link))
}

pub(super) fn is_no_ipv4() -> Stmt {
    is_not(meta(MetaKey::Nfproto), text("ipv4"))
}

pub(super) fn protocol(name: &'static str) -> Stmt {
    is(meta(MetaKey::L4proto), text(name))
}

pub(super) fn is_ping() -> Stmt {
    is(payload("icmp", "type"), text("echo-request"))
}

fn connection(key: &'static str) -> Expr {
    Expression::Named(NamedExpression::CT(CT { key: key.into(), family: None, dir: None }))
}

/// Belongs to a connection that was allowed before.
pub(super) fn belongs_to_connection() -> Stmt {
    let states = Expression::List(vec![text("established"), text("related")]);
    Statement::Match(Match { left: connection("state"), right: states, op: Operator::IN })
}

pub(super) fn opens_connection() -> Stmt {
    Statement::Match(Match { left: connection("state"), right: text("new"), op: Operator::IN })
}

/// Was sent to us by one of our own redirections.
pub(super) fn was_redirected() -> Stmt {
    Statement::Match(Match { left: connection("status"), right: text("dnat"), op: Operator::IN })
}

/// More connections than this are open through the rule.
pub(super) fn connections_over(limit: u32) -> Stmt {
    Statement::CTCount(stmt::CTCount { val: Expression::Number(limit), inv: Some(true) })
}

pub(super) fn block(address: Ipv4Addr, prefix: u8) -> Expr {
    Expression::Named(NamedExpression::Prefix(Prefix { addr: Box::new(text(address)), len: prefix.into() }))
}

pub(super) fn range(first: Ipv4Addr, last: Ipv4Addr) -> Expr {
    if first == last { text(first) } else { Expression::Range(Box::new(Range { range: [text(first), text(last)] })) }
}

pub(super) fn accept() -> Stmt {
    Statement::Accept(None)
}

pub(super) fn drop() -> Stmt {
    Statement::Drop(None)
}

pub(super) fn jump(chain: &'static str) -> Stmt {
    Statement::Jump(JumpTarget { target: chain.into() })
}

pub(super) fn goto(chain: &'static str) -> Stmt {
    Statement::Goto(JumpTarget { target: chain.into() })
}

pub(super) fn masquerade() -> Stmt {
    Statement::Masquerade(None)
}

/// To a port of the namespace that the rule is in, at the address of the incoming link.
pub(super) fn redirect_to(port: u16) -> Stmt {
    Statement::Redirect(Some(stmt::NAT { addr: None, family: None, port: Some(Expression::Number(port.into())), flags: None }))
}

pub(super) fn reset_connection() -> Stmt {
    Statement::Reject(Some(Reject::new(Some(RejectType::TCPReset), None)))
}

pub(super) fn reject() -> Stmt {
    Statement::Reject(Some(Reject::new(Some(RejectType::ICMPX), Some(RejectCode::AdminProhibited))))
}
