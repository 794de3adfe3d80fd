//! Numbered migrations: forward only, one change each, never edited once released. `PRAGMA user_version` counts them.

use super::StoreError;
use rusqlite::Connection;
use std::path::Path;
use std::sync::Arc;

/// Of `stillbox.db`. `truth/schema.sql` is where they lead.
pub(super) const TRUTH: &[&str] = &[
    include_str!("truth/0001_first.sql"),
    include_str!("truth/0002_lists_from_the_index.sql"),
    include_str!("truth/0003_builds.sql"),
    include_str!("truth/0004_secrets.sql"),
    include_str!("truth/0005_volumes.sql"),
];
/// Of `history.db`. `history/schema.sql` is where they lead.
pub(super) const HISTORY: &[&str] =
    &[include_str!("history/0001_first.sql"), include_str!("history/0002_events.sql"), include_str!("history/0003_event_failures.sql")];

/// Applies what is missing, each migration in a transaction of its own.
pub(super) fn to_newest(connection: &mut Connection, file: &Path, migrations: &[&str]) -> Result<(), StoreError> {
    let failed = |source: rusqlite::Error| StoreError::Database { file: file.to_owned(), source: Arc::new(source) };
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
    let found = usize::try_from(found).unwrap_or(usize::MAX);
    if found > migrations.len() {
        return Err(StoreError::TooNew { file: file.to_owned(), found, known: migrations.len() });
    }
    for (number, migration) in (1..).zip(migrations).skip(found) {
        let transaction = connection.transaction().map_err(failed)?;
        transaction.execute_batch(migration).map_err(failed)?;
        transaction.pragma_update(None, "user_version", number).map_err(failed)?;
        transaction.commit().map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name and text of everything in a database, white space evened out.
    fn layout(connection: &Connection) -> Vec<(String, String)> {
        let mut statement = connection.prepare("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").unwrap();
        let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))).unwrap();
        rows.map(|row| row.map(|(name, sql)| (name, sql.split_whitespace().collect::<Vec<_>>().join(" "))).unwrap()).collect()
    }

    fn migrated(migrations: &[&str]) -> Connection {
        let mut connection = Connection::open_in_memory().unwrap();
        to_newest(&mut connection, Path::new(":memory:"), migrations).unwrap();
        connection
    }

    #[test]
    fn an_empty_database_reaches_exactly_the_schema() {
        for (migrations, schema) in [(TRUTH, include_str!("truth/schema.sql")), (HISTORY, include_str!("history/schema.sql"))] {
            let wanted = Connection::open_in_memory().unwrap();
            wanted.execute_batch(schema).unwrap();
            assert_eq!(layout(&migrated(migrations)), layout(&wanted));
        }
    }

    #[test]
    fn each_migration_keeps_the_rows_of_the_one_before() {
        let mut connection = migrated(&TRUTH[..1]);
        let row = "INSERT INTO sandboxes VALUES ('i1', 'running', 't', '{}', 1, 2, 3, NULL, 's', NULL, 1, NULL, NULL, NULL, NULL, 'b')";
        connection.execute_batch(row).unwrap();
        to_newest(&mut connection, Path::new(":memory:"), TRUTH).unwrap();
        let kept: String = connection.query_row("SELECT id FROM sandboxes WHERE state = 'running'", [], |row| row.get(0)).unwrap();
        assert_eq!(kept, "i1");
    }

    #[test]
    fn migrating_twice_changes_nothing() {
        let mut connection = migrated(TRUTH);
        let before = layout(&connection);
        to_newest(&mut connection, Path::new(":memory:"), TRUTH).unwrap();
        assert_eq!(layout(&connection), before);
    }

    #[test]
    fn a_database_of_a_newer_release_is_left_alone() {
        let mut connection = migrated(TRUTH);
        connection.pragma_update(None, "user_version", 1000).unwrap();
        let error = to_newest(&mut connection, Path::new("stillbox.db"), TRUTH).unwrap_err();
        assert!(error.to_string().contains("schema 1000"), "{error}");
    }
}
