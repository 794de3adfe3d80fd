//! Columns to the model's types and back. What this program never wrote is an error that names the column.

use super::StoreError;
use crate::model::LogLevel;
use rusqlite::Row;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::str::FromStr;
use time::OffsetDateTime;

pub(super) fn corrupt(column: &'static str, value: &str, expected: &'static str) -> StoreError {
    StoreError::Corrupt { column, value: value.chars().take(64).collect(), expected }
}

/// Microseconds since 1970: what SQLite keeps of a time. Cursors and filters are this precise.
pub(super) fn micros(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos() / 1000).unwrap_or(i64::MAX)
}

pub(super) fn time(column: &'static str, micros: i64) -> Result<OffsetDateTime, StoreError> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1000)
        .map_err(|_| corrupt(column, &micros.to_string(), "a time in microseconds since 1970"))
}

pub(super) fn time_in(row: &Row<'_>, column: &'static str) -> Result<OffsetDateTime, StoreError> {
    time(column, row.get(column)?)
}

pub(super) fn optional_time_in(row: &Row<'_>, column: &'static str) -> Result<Option<OffsetDateTime>, StoreError> {
    row.get::<_, Option<i64>>(column)?.map(|micros| time(column, micros)).transpose()
}

pub(super) fn parsed_in<T: FromStr>(row: &Row<'_>, column: &'static str) -> Result<T, StoreError> {
    parsed(column, &row.get::<_, String>(column)?)
}

pub(super) fn optional_parsed_in<T: FromStr>(row: &Row<'_>, column: &'static str) -> Result<Option<T>, StoreError> {
    row.get::<_, Option<String>>(column)?.map(|text| parsed(column, &text)).transpose()
}

fn parsed<T: FromStr>(column: &'static str, text: &str) -> Result<T, StoreError> {
    text.parse().map_err(|_| corrupt(column, text, "of the form of its type"))
}

pub(super) fn json_in<T: DeserializeOwned>(row: &Row<'_>, column: &'static str) -> Result<T, StoreError> {
    from_json(column, &row.get::<_, String>(column)?)
}

pub(super) fn optional_json_in<T: DeserializeOwned>(row: &Row<'_>, column: &'static str) -> Result<Option<T>, StoreError> {
    row.get::<_, Option<String>>(column)?.map(|text| from_json(column, &text)).transpose()
}

fn from_json<T: DeserializeOwned>(column: &'static str, text: &str) -> Result<T, StoreError> {
    // The text itself may hold secrets (environment), so it stays out of the error.
    serde_json::from_str(text).map_err(|_| corrupt(column, "(not shown)", "JSON of its type"))
}

pub(super) fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("the model's types are plain data with text keys")
}

/// SQLite's integers are signed; what does not fit cannot occur in a size or a counter.
pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

pub(super) fn unsigned_in(row: &Row<'_>, column: &'static str) -> Result<u64, StoreError> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| corrupt(column, &value.to_string(), "a count"))
}

pub(super) const fn from_level(level: LogLevel) -> i64 {
    match level {
        LogLevel::Debug => 0,
        LogLevel::Info => 1,
        LogLevel::Warn => 2,
        LogLevel::Error => 3,
    }
}

pub(super) fn level_in(row: &Row<'_>, column: &'static str) -> Result<LogLevel, StoreError> {
    match row.get::<_, i64>(column)? {
        0 => Ok(LogLevel::Debug),
        1 => Ok(LogLevel::Info),
        2 => Ok(LogLevel::Warn),
        3 => Ok(LogLevel::Error),
        other => Err(corrupt(column, &other.to_string(), "a level from 0 to 3")),
    }
}
