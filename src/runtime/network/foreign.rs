//! Other people's firewalls on the host, where a packet of ours would be dropped though our own table accepts it: an
//! accept ends one table's verdict only. Docker and ufw set the policy of FORWARD to drop; we put an accept at its head,
//! marked with our name, and take it away again.
//!
//! A chain is changed by the tool that made it: `iptables` (nft or legacy) for its own, `nft` for all others.

use super::nft::into_io;
use super::rules::{link_prefix, table_name};
use crate::model::InstanceId;
use nftables::helper;
use serde_json::{Value, json};
use std::io;
use std::process::{Command, Stdio};

/// A chain of the nft ruleset, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) family: String,
    pub(super) table: String,
    pub(super) name: String,
    kind: String,
    hook: String,
    policy: String,
}

impl Chain {
    fn is_ours(&self) -> bool {
        self.table == "stillbox" || self.table.starts_with("stillbox_")
    }

    /// Somebody else translates addresses on this host.
    pub(super) fn does_foreign_nat(&self) -> bool {
        self.kind == "nat" && !self.is_ours()
    }

    fn forwards_ipv4(&self) -> bool {
        self.kind == "filter" && self.hook == "forward" && ["ip", "inet"].contains(&self.family.as_str()) && !self.is_ours()
    }

    /// Made by iptables-nft, which must be able to read its own table back.
    fn is_iptables(&self) -> bool {
        self.family == "ip" && self.table == "filter" && self.name == "FORWARD"
    }
}

/// All chains of the host.
pub(super) fn chains() -> io::Result<Vec<Chain>> {
    let listing = list(&["list", "chains"])?;
    Ok(objects(&listing).filter_map(|object| object.get("chain")).map(read_chain).collect())
}

fn read_chain(chain: &Value) -> Chain {
    let field = |name: &str| chain.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    Chain {
        family: field("family"),
        table: field("table"),
        name: field("name"),
        kind: field("type"),
        hook: field("hook"),
        policy: field("policy"),
    }
}

fn list(arguments: &[&str]) -> io::Result<Value> {
    let text = helper::get_current_ruleset_raw(helper::DEFAULT_NFT, arguments.iter().copied()).map_err(into_io)?;
    serde_json::from_str(&text).map_err(io::Error::other)
}

fn objects(listing: &Value) -> impl Iterator<Item = &Value> {
    listing.get("nftables").and_then(Value::as_array).into_iter().flatten()
}

/// Puts our accepts at the head of every chain that would drop our packets; replaces those that are there.
pub(super) fn open(instance: InstanceId) -> io::Result<()> {
    close(instance)?;
    for chain in dropping(&chains()?)? {
        match iptables_for(chain) {
            Some(program) => iptables_open(program, instance)?,
            None => nft_open(chain, instance)?,
        }
    }
    if let Some(program) = legacy_iptables() {
        iptables_open(program, instance)?;
    }
    Ok(())
}

/// Whether our accepts are where [`open`] puts them.
pub(super) fn is_open(instance: InstanceId, chains: &[Chain]) -> io::Result<bool> {
    for chain in dropping(chains)? {
        let is_open = match iptables_for(chain) {
            Some(program) => iptables_is_open(program, instance)?,
            None => !our_rules(chain, instance)?.is_empty(),
        };
        if !is_open {
            return Ok(false);
        }
    }
    legacy_iptables().map_or(Ok(true), |program| iptables_is_open(program, instance))
}

/// Those in which our packets would end.
fn dropping(chains: &[Chain]) -> io::Result<Vec<&Chain>> {
    let mut dropping = Vec::new();
    for chain in chains.iter().filter(|chain| chain.forwards_ipv4()) {
        if chain.policy == "drop" || ends_in_refusal(chain)? {
            dropping.push(chain);
        }
    }
    Ok(dropping)
}

/// Takes our accepts away, wherever they are.
pub(super) fn close(instance: InstanceId) -> io::Result<()> {
    for chain in chains()?.iter().filter(|chain| chain.forwards_ipv4()) {
        for handle in our_rules(chain, instance)? {
            let rule = json!({"family": chain.family, "table": chain.table, "chain": chain.name, "handle": handle});
            apply(&json!({"nftables": [{"delete": {"rule": rule}}]}))?;
        }
        if let Some(program) = iptables_for(chain) {
            iptables_close(program, instance)?;
        }
    }
    if let Some(program) = legacy_iptables() {
        iptables_close(program, instance)?;
    }
    Ok(())
}

fn apply(commands: &Value) -> io::Result<()> {
    let none: [&str; 0] = [];
    helper::apply_ruleset_raw(&commands.to_string(), helper::DEFAULT_NFT, none).map(|_| ()).map_err(into_io)
}

fn rules_of(chain: &Chain) -> io::Result<Vec<Value>> {
    let listing = list(&["list", "chain", &chain.family, &chain.table, &chain.name])?;
    Ok(objects(&listing).filter_map(|object| object.get("rule")).cloned().collect())
}

/// firewalld and hand-written rule sets often keep the policy and refuse in the last rule.
fn ends_in_refusal(chain: &Chain) -> io::Result<bool> {
    let rules = rules_of(chain)?;
    let last = rules.last().and_then(|rule| rule.get("expr")).and_then(Value::as_array);
    Ok(last.is_some_and(|statements| refuses_everything(statements)))
}

fn refuses_everything(statements: &[Value]) -> bool {
    statements.iter().all(is_refusal_or_count) && statements.iter().any(is_refusal)
}

fn is_refusal(statement: &Value) -> bool {
    statement.get("drop").is_some() || statement.get("reject").is_some()
}

fn is_refusal_or_count(statement: &Value) -> bool {
    is_refusal(statement) || statement.get("counter").is_some() || statement.get("log").is_some()
}

fn our_rules(chain: &Chain, instance: InstanceId) -> io::Result<Vec<u64>> {
    let mark = table_name(instance);
    let is_ours = |rule: &&Value| rule.get("comment").and_then(Value::as_str) == Some(&mark);
    Ok(rules_of(chain)?.iter().filter(is_ours).filter_map(|rule| rule.get("handle").and_then(Value::as_u64)).collect())
}

fn nft_open(chain: &Chain, instance: InstanceId) -> io::Result<()> {
    let links = format!("{}*", link_prefix(instance));
    let matches = |key: &str| json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": links}});
    let answered = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}});
    let rule = |expr: Value| {
        let mark = table_name(instance);
        json!({"insert": {"rule": {"family": chain.family, "table": chain.table, "chain": chain.name, "comment": mark, "expr": expr}}})
    };
    apply(&json!({"nftables": [
        rule(json!([matches("iifname"), {"accept": null}])),
        rule(json!([matches("oifname"), answered, {"accept": null}])),
    ]}))
}

/// The iptables that made this chain, if it is one of iptables' and the program is there.
fn iptables_for(chain: &Chain) -> Option<&'static str> {
    let is_nft = |program: &&str| iptables_version(program).is_some_and(|version| version.contains("nf_tables"));
    chain.is_iptables().then(|| ["iptables-nft", "iptables"].into_iter().find(is_nft)).flatten()
}

/// The pre-nft iptables, if its filter table is in use here and the program is there.
fn legacy_iptables() -> Option<&'static str> {
    let is_legacy = |program: &&str| iptables_version(program).is_some_and(|version| !version.contains("nf_tables"));
    legacy_tables().contains("filter").then(|| ["iptables-legacy", "iptables"].into_iter().find(is_legacy)).flatten()
}

fn iptables_version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn iptables_rules(instance: InstanceId) -> [Vec<String>; 2] {
    let links = format!("{}+", link_prefix(instance));
    let mark = table_name(instance);
    let rule = |matches: &[&str]| {
        let tail = ["-m", "comment", "--comment", mark.as_str(), "-j", "ACCEPT"];
        matches.iter().chain(&tail).map(|&word| word.to_owned()).collect()
    };
    [rule(&["-i", &links]), rule(&["-o", &links, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED"])]
}

fn iptables_open(program: &str, instance: InstanceId) -> io::Result<()> {
    for rule in iptables_rules(instance) {
        let output = iptables(program, "-I", &rule)?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
            return Err(io::Error::other(format!("{program}: {message}")));
        }
    }
    Ok(())
}

fn iptables_is_open(program: &str, instance: InstanceId) -> io::Result<bool> {
    for rule in iptables_rules(instance) {
        if !iptables(program, "-C", &rule)?.status.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Each rule as often as it is there.
fn iptables_close(program: &str, instance: InstanceId) -> io::Result<()> {
    for rule in iptables_rules(instance) {
        while iptables(program, "-D", &rule)?.status.success() {}
    }
    Ok(())
}

fn iptables(program: &str, verb: &str, rule: &[String]) -> io::Result<std::process::Output> {
    Command::new(program).args(["-w", "5", verb, "FORWARD"]).args(rule).stdin(Stdio::null()).output()
}

/// Tables of the legacy, pre-nft iptables in this netns; empty where that is not in use.
fn legacy_tables() -> String {
    std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default()
}

/// Somebody translates addresses by legacy iptables.
pub(super) fn legacy_nat() -> bool {
    legacy_tables().contains("nat")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(family: &str, table: &str, name: &str) -> Chain {
        let text = |text: &str| text.to_owned();
        let (kind, hook, policy) = (text("filter"), text("forward"), text("drop"));
        Chain { family: text(family), table: text(table), name: text(name), kind, hook, policy }
    }

    #[test]
    fn only_others_chains_that_see_our_packets_are_looked_at() {
        assert!(chain("ip", "filter", "FORWARD").forwards_ipv4());
        assert!(chain("inet", "filter", "forward").forwards_ipv4());
        assert!(!chain("ip6", "filter", "FORWARD").forwards_ipv4());
        assert!(!chain("inet", "stillbox_abcde", "forward").forwards_ipv4());
        assert!(!Chain { hook: "input".to_owned(), ..chain("ip", "filter", "FORWARD") }.forwards_ipv4());
    }

    #[test]
    fn a_last_rule_that_refuses_everything_is_told_from_one_that_refuses_something() {
        let all = json!([{"counter": {"packets": 0, "bytes": 0}}, {"reject": {"type": "icmpx"}}]);
        let some = json!([{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"}}, {"drop": null}]);
        let refuses = |statements: &Value| refuses_everything(statements.as_array().unwrap());
        assert!(refuses(&all) && !refuses(&some));
    }
}
