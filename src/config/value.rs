//! How one value is read, from a file's TOML or from the text of a variable or flag.

use crate::model::ByteSize;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// A value before its meaning is known.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// From a variable or flag; lists are separated by commas.
    Text(String),
    /// From the file.
    File(toml::Value),
}

impl Value {
    fn shown(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::File(toml::Value::String(text)) => text.clone(),
            Self::File(value) => value.to_string(),
        }
    }

    pub(super) fn text(&self) -> Result<String, String> {
        match self {
            Self::Text(text) | Self::File(toml::Value::String(text)) => Ok(text.clone()),
            Self::File(value) => Err(format!("{value} is not a text; put it in quotes")),
        }
    }

    pub(super) fn flag(&self) -> Result<bool, String> {
        match self.shown().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(format!("'{other}' is neither true nor false")),
        }
    }

    pub(super) fn whole<T: TryFrom<u64>>(&self, least: u64, most: u64) -> Result<T, String> {
        let shown = self.shown();
        let wrong = || format!("'{shown}' is not a whole number from {least} to {most}");
        let number: u64 = shown.parse().map_err(|_| wrong())?;
        if number < least || number > most {
            return Err(wrong());
        }
        T::try_from(number).map_err(|_| wrong())
    }

    pub(super) fn size(&self) -> Result<ByteSize, String> {
        self.shown().parse().map_err(|error: crate::model::ParseSizeError| error.to_string())
    }

    /// `300 s`, `2 min`, `50 ms`, `24 h`, `30 d`.
    pub(super) fn duration(&self) -> Result<Duration, String> {
        let shown = self.shown();
        let wrong = || format!("'{shown}' is not a duration; write a whole number with ms, s, min, h or d, such as '300 s'");
        let trimmed = shown.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let count: u64 = trimmed[..digits].parse().map_err(|_| wrong())?;
        let unit_ms: u64 = match trimmed[digits..].trim() {
            "ms" => 1,
            "s" => 1000,
            "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        count.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)
    }

    pub(super) fn list(&self) -> Result<Vec<String>, String> {
        match self {
            Self::Text(text) => Ok(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()),
            Self::File(toml::Value::Array(items)) => items.iter().map(|item| Self::File(item.clone()).text()).collect(),
            Self::File(value) => Err(format!("{value} is not a list of texts")),
        }
    }

    /// A table of texts; from a variable or flag `NAME=TEXT`, separated by commas.
    pub(super) fn map(&self) -> Result<BTreeMap<String, String>, String> {
        let pair = |item: &str| match item.split_once('=') {
            Some((name, text)) => Ok((name.trim().to_owned(), text.trim().to_owned())),
            None => Err(format!("'{item}' is not NAME=TEXT")),
        };
        match self {
            Self::Text(text) => text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(pair).collect(),
            Self::File(toml::Value::Table(table)) => {
                table.iter().map(|(name, value)| Ok((name.clone(), Self::File(value.clone()).text()?))).collect()
            }
            Self::File(value) => Err(format!("{value} is not a table of texts")),
        }
    }
}

/// Addresses that a listener binds, all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// At least one. `localhost:PORT` stands for 127.0.0.1 and ::1, because `*.localhost` resolves to ::1 first where
    /// libnss-myhostname or systemd-resolved is active.
    pub addresses: Vec<SocketAddr>,
}

impl Listen {
    /// Both loopback addresses.
    pub fn loopback(port: u16) -> Self {
        Self {
            addresses: vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port), SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port)],
        }
    }

    /// The port of the first address.
    pub fn port(&self) -> u16 {
        self.addresses[0].port()
    }

    /// Whether only this machine can connect.
    pub fn is_loopback(&self) -> bool {
        self.addresses.iter().all(|address| address.ip().is_loopback())
    }

    pub(super) fn parse(value: &Value) -> Result<Self, String> {
        let mut addresses = Vec::new();
        for item in value.list().or_else(|_| value.text().map(|text| vec![text]))? {
            for part in item.split(',').map(str::trim) {
                match part.strip_prefix("localhost:").and_then(|port| port.parse().ok()) {
                    Some(port) => addresses.extend(Self::loopback(port).addresses),
                    None => addresses.push(part.parse().map_err(|_| {
                        format!("'{part}' is not an address; write ADDRESS:PORT such as 127.0.0.1:3000, [::1]:3000 or localhost:3000")
                    })?),
                }
            }
        }
        if addresses.is_empty() { Err("no address given".to_owned()) } else { Ok(Self { addresses }) }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, address) in self.addresses.iter().enumerate() {
            write!(f, "{}{address}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn localhost_means_both_loopback_addresses() {
        let listen = Listen::parse(&Value::Text("localhost:3000".into())).unwrap();
        assert_eq!(listen, Listen::loopback(3000));
        assert_eq!(listen.to_string(), "127.0.0.1:3000, [::1]:3000");
        assert!(listen.is_loopback());
    }

    #[test]
    fn a_duration_needs_its_unit() {
        assert_eq!(Value::Text("300 s".into()).duration(), Ok(Duration::from_secs(300)));
        assert_eq!(Value::Text("50ms".into()).duration(), Ok(Duration::from_millis(50)));
        assert!(Value::Text("300".into()).duration().is_err());
        assert!(Value::Text("99999999999999999999 d".into()).duration().is_err());
    }

    #[test]
    fn a_table_is_written_in_one_line_too() {
        let read = Value::Text("ubuntu:22.04=/srv/u.tar, a/b = template:base".into()).map().unwrap();
        assert_eq!(read["ubuntu:22.04"], "/srv/u.tar");
        assert_eq!(read["a/b"], "template:base");
        assert!(Value::Text("ubuntu".into()).map().is_err());
    }

    #[test]
    fn numbers_outside_their_range_name_the_range() {
        let error = Value::Text("0".into()).whole::<u32>(1, 10).unwrap_err();
        assert_eq!(error, "'0' is not a whole number from 1 to 10");
    }
}
