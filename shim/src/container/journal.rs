//! The journal: what a container was doing, on disk, for whoever comes after a crash of its shim.
//!
//! One small file in the bundle, replaced as a whole before the shim acts on what it says.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The journal's name in the bundle.
const FILE: &str = "agentcube-journal.json";
/// The longest journal that is read: a path and a few words.
const MAX_FILE: u64 = 64 << 10;

/// What the shim is about to do, or has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Created or running: processes hold the state.
    Running,
    /// Its cgroup is frozen, or about to be: processes hold the state.
    Frozen,
    /// Frozen, and its memory has been pushed out: processes hold the state, partly in swap.
    Reclaimed,
    /// A dump is under way: processes hold the state until the image is complete.
    Dumping,
    /// The image holds the state.
    Checkpointed,
    /// A restore is under way: the image holds the state until it has succeeded.
    Restoring,
    /// It has ended.
    Stopped,
}

/// The journal's contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What was going on.
    pub phase: Phase,
    /// The init process, the last known while it sleeps.
    pub pid: u32,
    /// The image, from the end of a dump on.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image: Option<PathBuf>,
}

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It could not be written.
    #[error("cannot write the journal {path}: {source}; is the file system of the bundle full or read-only?")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It could not be read.
    #[error("cannot read the journal {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what this version writes.
    #[error("the journal {path} is damaged: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// A container's journal.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    /// The journal in `bundle`.
    pub fn in_bundle(bundle: &Path) -> Self {
        Self { path: bundle.join(FILE) }
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// [`JournalError::Write`]; the old record stands then.
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        let write = || -> std::io::Result<()> {
            let next = self.path.with_extension("json.next");
            let mut file = fs::File::create(&next)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_data()?;
            fs::rename(&next, &self.path)
        };
        write().map_err(|source| JournalError::Write { path: self.path.clone(), source })
    }

    /// Reads the record; none if nothing was ever written.
    ///
    /// # Errors
    /// [`JournalError::Read`], [`JournalError::Damaged`].
    pub fn read(&self) -> Result<Option<Record>, JournalError> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut text = Vec::new();
            // What is longer ends in the middle and is damaged.
            fs::File::open(&self.path)?.take(MAX_FILE).read_to_end(&mut text)?;
            Ok(text)
        };
        let text = match read() {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(JournalError::Read { path: self.path.clone(), source });
            }
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| JournalError::Damaged { path: self.path.clone(), source })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_written_last_is_read() {
        let bundle = tempfile::tempdir().unwrap();
        let journal = Journal::in_bundle(bundle.path());
        assert_eq!(journal.read().unwrap(), None);
        let running = Record { phase: Phase::Running, pid: 7, image: None };
        let asleep = Record { phase: Phase::Checkpointed, pid: 7, image: Some("/images/7".into()) };
        journal.write(&running).unwrap();
        journal.write(&asleep).unwrap();
        assert_eq!(journal.read().unwrap(), Some(asleep));
    }

    #[test]
    fn a_damaged_journal_is_told_apart_from_none() {
        let bundle = tempfile::tempdir().unwrap();
        let journal = Journal::in_bundle(bundle.path());
        fs::write(&journal.path, b"{\"phase\":\"dumb").unwrap();
        assert!(matches!(journal.read(), Err(JournalError::Damaged { .. })));
    }

    #[test]
    fn a_bundle_that_is_gone_is_an_error_that_names_the_file() {
        let journal = Journal::in_bundle(Path::new("/nonexistent/bundle"));
        let error = journal.write(&Record { phase: Phase::Running, pid: 1, image: None }).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/bundle/agentcube-journal.json"), "{error}");
    }

    #[test]
    fn a_journal_beyond_measure_is_damaged_and_not_read_whole() {
        let bundle = tempfile::tempdir().unwrap();
        let journal = Journal::in_bundle(bundle.path());
        fs::File::create(&journal.path).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(journal.read(), Err(JournalError::Damaged { .. })));
    }

    fn phases() -> impl Strategy<Value = Phase> {
        prop::sample::select(vec![
            Phase::Running,
            Phase::Dumping,
            Phase::Checkpointed,
            Phase::Restoring,
            Phase::Stopped,
        ])
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(phase in phases(), pid: u32, image in prop::option::of("/\\PC{0,40}")) {
            let bundle = tempfile::tempdir().unwrap();
            let journal = Journal::in_bundle(bundle.path());
            let record = Record { phase, pid, image: image.map(PathBuf::from) };
            journal.write(&record).unwrap();
            prop_assert_eq!(journal.read().unwrap(), Some(record));
        }

        #[test]
        fn arbitrary_bytes_are_damage(bytes: Vec<u8>) {
            let bundle = tempfile::tempdir().unwrap();
            let journal = Journal::in_bundle(bundle.path());
            fs::write(&journal.path, bytes).unwrap();
            let damaged = matches!(journal.read(), Err(JournalError::Damaged { .. }));
            prop_assert!(damaged);
        }
    }
}
