//! runc's own record of a container, `state.json`, brought up to date after a restore that runc had no part in.
//!
//! The format is runc's private one, so it is read strictly: anything that is not exactly as the runcs known here write
//! it is an error, and the caller takes the way through `runc checkpoint` and `runc restore` instead.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use criu_hooks::procfs;
use rustix::{fs::OFlags, process::Pid};
use serde_json::{Map, Value};

/// The longest state that is read, in bytes; a usual one has five thousand.
const MAX_STATE: u64 = 4 * 1024 * 1024;

/// The name of the file in the container's directory.
const NAME: &str = "state.json";

/// The namespaces that runc writes, and the name of each in `/proc/PID/ns`.
const NAMESPACES: &[(&str, &str)] = &[
    ("NEWCGROUP", "cgroup"),
    ("NEWIPC", "ipc"),
    ("NEWNET", "net"),
    ("NEWNS", "mnt"),
    ("NEWPID", "pid"),
    ("NEWTIME", "time"),
    ("NEWUSER", "user"),
    ("NEWUTS", "uts"),
];

/// What can be wrong with a state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read or replaced.
    #[error("cannot {action} runc's {}: {source}", path.display())]
    Io {
        /// "read" or "replace".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no JSON, or too long.
    #[error("runc's {} is not a state: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A field is not as known: this is a runc that the program does not know.
    #[error("the field {field:?} of runc's {} is not as known: {why}", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The new process is gone already.
    #[error("the restored process {pid} is gone: {source}")]
    Process {
        /// The process.
        pid: Pid,
        /// Why.
        source: io::Error,
    },
}

/// Where runc, run with `root`, keeps the state of container `id`. containerd's shims use `/run/containerd/runc` and the
/// containerd namespace.
pub fn path(root: &Path, namespace: &str, id: &str) -> PathBuf {
    root.join(namespace).join(id).join(NAME)
}

/// A state that is as known.
#[derive(Debug, Clone, PartialEq)]
pub struct StateFile {
    fields: Map<String, Value>,
    init_pid: i64,
}

impl StateFile {
    /// Reads a state.
    ///
    /// # Errors
    /// See [`Error`]; a link in its place is not followed.
    pub fn read(path: &Path) -> Result<StateFile, Error> {
        let mut bytes = Vec::new();
        open(path)
            .and_then(|file| file.take(MAX_STATE + 1).read_to_end(&mut bytes))
            .map_err(|source| Error::Io { action: "read", path: path.to_owned(), source })?;
        StateFile::parse(&bytes, path)
    }

    /// Reads a state out of `bytes`. `path` is for errors.
    ///
    /// # Errors
    /// When anything in it is not as known.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<StateFile, Error> {
        let malformed = |why: String| Error::Malformed { path: path.to_owned(), why };
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_STATE {
            return Err(malformed(format!("it is longer than {MAX_STATE} bytes")));
        }
        let fields: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        let unknown =
            |field: &str, why| Error::Unknown { path: path.to_owned(), field: field.to_owned(), why };

        for field in ["id", "init_process_pid", "init_process_start", "config", "namespace_paths"] {
            if !fields.contains_key(field) {
                return Err(unknown(field, "it is missing"));
            }
        }
        for (field, value) in &fields {
            check_field(field, value).map_err(|why| unknown(field, why))?;
        }
        let init_pid = fields["init_process_pid"].as_i64().unwrap_or_default();
        for (name, value) in fields["namespace_paths"].as_object().into_iter().flatten() {
            let field = format!("namespace_paths.{name}");
            let known = NAMESPACES.iter().find(|(known, _)| known == name);
            let (_, link) = known.ok_or_else(|| unknown(&field, "no namespace of this name is known"))?;
            if value.as_str() != Some(&namespace_path(init_pid, link)) {
                return Err(unknown(&field, "it does not lead to the first process"));
            }
        }
        Ok(StateFile { fields, init_pid })
    }

    /// The container's first process.
    pub fn init_pid(&self) -> i64 {
        self.init_pid
    }

    /// The same state with another first process, started `start` clock ticks after the boot of the machine. Every other
    /// value stays.
    #[must_use]
    pub fn with_process(&self, pid: Pid, start: u64) -> StateFile {
        let mut fields = self.fields.clone();
        let init_pid = i64::from(pid.as_raw_nonzero().get());
        fields.insert("init_process_pid".to_owned(), init_pid.into());
        fields.insert("init_process_start".to_owned(), start.into());
        if let Some(paths) = fields.get_mut("namespace_paths").and_then(Value::as_object_mut) {
            for (name, path) in paths.iter_mut() {
                if let Some((_, link)) = NAMESPACES.iter().find(|(known, _)| known == name) {
                    *path = namespace_path(init_pid, link).into();
                }
            }
        }
        StateFile { fields, init_pid }
    }

    /// The state as runc reads it.
    pub fn to_bytes(&self) -> Vec<u8> {
        Value::Object(self.fields.clone()).to_string().into_bytes()
    }
}

/// Tells runc that the container's first process is now `pid`. The file is replaced in one step.
///
/// # Errors
/// See [`Error`]; the file is then as it was.
pub fn update(path: &Path, pid: Pid) -> Result<(), Error> {
    let state = StateFile::read(path)?;
    let start = procfs::stat(pid).map_err(|source| Error::Process { pid, source })?.start_time;
    let failed = |source| Error::Io { action: "replace", path: path.to_owned(), source };
    replace(path, &state.with_process(pid, start).to_bytes()).map_err(failed)
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_file_name(".state.json.agentcube");
    let write = || {
        let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
        let mut file = options.open(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&unfinished);
    })
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    fs::OpenOptions::new().read(true).custom_flags(flags).open(path)
}

fn namespace_path(pid: i64, link: &str) -> String {
    format!("/proc/{pid}/ns/{link}")
}

/// Checks one field of the outermost level.
fn check_field(field: &str, value: &Value) -> Result<(), &'static str> {
    let (as_known, why) = match field {
        "id" => (value.as_str().is_some_and(|id| !id.is_empty()), "it is not a name"),
        "init_process_pid" => {
            let fits = value.as_i64().is_some_and(|pid| pid > 0 && i32::try_from(pid).is_ok());
            (fits, "it is not a process id")
        }
        "init_process_start" => (value.is_u64(), "it is not a number of ticks"),
        "created" | "intel_rdt_path" => (value.is_string(), "it is not text"),
        "rootless" => (value.is_boolean(), "it is neither true nor false"),
        "config" => (value.is_object(), "it is not an object"),
        "cgroup_paths" | "namespace_paths" => {
            let paths = value.as_object().is_some_and(|paths| paths.values().all(Value::is_string));
            (paths, "it is not an object of paths")
        }
        "external_descriptors" => {
            let names = value.as_array().is_some_and(|names| names.iter().all(Value::is_string));
            (value.is_null() || names, "it is not a list of names")
        }
        _ => (false, "no field of this name is known"),
    };
    if !as_known {
        return Err(why);
    }
    if has_fraction(value) {
        // It could not be written back digit by digit.
        return Err("it has a number that is not whole");
    }
    Ok(())
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_fraction),
        Value::Object(fields) => fields.values().any(has_fraction),
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    /// States of real containers, by the version of runc.
    const SAMPLES: &[(&str, &[u8])] = &[
        ("1.1.5", include_bytes!("fixtures/state-1.1.5.json")),
        ("1.1.15", include_bytes!("fixtures/state-1.1.15.json")),
        ("1.3.6", include_bytes!("fixtures/state-1.3.6.json")),
    ];

    fn at() -> &'static Path {
        Path::new("state.json")
    }

    /// Something done to a state.
    type Change = &'static dyn Fn(&mut Value);

    fn sample() -> Value {
        serde_json::from_slice(SAMPLES[2].1).unwrap()
    }

    #[test]
    fn every_known_runc_is_understood_and_only_the_process_changes() {
        for (version, bytes) in SAMPLES {
            let state =
                StateFile::parse(bytes, at()).unwrap_or_else(|error| panic!("runc {version}: {error}"));
            let before: Value = serde_json::from_slice(bytes).unwrap();
            let updated = state.with_process(Pid::from_raw(4242).unwrap(), 987_654_321);
            let mut after: Value = serde_json::from_slice(&updated.to_bytes()).unwrap();
            assert_eq!(after["init_process_pid"], 4242);
            assert_eq!(after["init_process_start"], 987_654_321);
            let paths = after["namespace_paths"].as_object().unwrap();
            assert_eq!(paths.len(), before["namespace_paths"].as_object().unwrap().len());
            for (name, path) in paths {
                assert!(path.as_str().unwrap().starts_with("/proc/4242/ns/"), "{name}: {path}");
            }
            for field in ["init_process_pid", "init_process_start", "namespace_paths"] {
                after[field] = before[field].clone();
            }
            assert_eq!(after, before, "runc {version}");
            assert_eq!(StateFile::parse(&updated.to_bytes(), at()).unwrap().init_pid(), 4242);
        }
    }

    #[test]
    fn the_time_namespace_of_newer_runcs_is_kept() {
        let state = StateFile::parse(SAMPLES[2].1, at()).unwrap().with_process(Pid::from_raw(9).unwrap(), 1);
        let after: Value = serde_json::from_slice(&state.to_bytes()).unwrap();
        assert_eq!(after["namespace_paths"]["NEWTIME"], "/proc/9/ns/time");
        assert_eq!(after["namespace_paths"]["NEWNS"], "/proc/9/ns/mnt");
    }

    #[test]
    fn what_is_not_as_known_is_refused_by_name() {
        let cases: &[(&str, Change)] = &[
            ("new_field", &|state| state["new_field"] = json!(1)),
            ("init_process_pid", &|state| {
                state["init_process_pid"] = json!("46");
            }),
            ("init_process_pid", &|state| state["init_process_pid"] = json!(0)),
            ("init_process_pid", &|state| {
                state["init_process_pid"] = json!(1u64 << 40);
            }),
            ("init_process_start", &|state| {
                state["init_process_start"] = json!(-1);
            }),
            ("init_process_start", &|state| {
                state.as_object_mut().unwrap().remove("init_process_start");
            }),
            ("namespace_paths", &|state| state["namespace_paths"] = json!([])),
            ("namespace_paths.NEWNET", &|state| {
                state["namespace_paths"]["NEWNET"] = json!("/run/netns/x");
            }),
            ("namespace_paths.NEWODD", &|state| {
                state["namespace_paths"]["NEWODD"] = json!("/proc/1/ns/odd");
            }),
            ("config", &|state| {
                state["config"]["cgroups"]["weight"] = json!(0.1);
            }),
            ("external_descriptors", &|state| {
                state["external_descriptors"] = json!([1]);
            }),
            ("rootless", &|state| state["rootless"] = json!("no")),
        ];
        for (field, change) in cases {
            let mut state = sample();
            change(&mut state);
            match StateFile::parse(&serde_json::to_vec(&state).unwrap(), at()) {
                Err(Error::Unknown { field: found, .. }) => assert_eq!(found, *field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn torn_and_overlong_states_are_refused() {
        let whole = SAMPLES[0].1;
        for length in [0, 1, whole.len() / 2, whole.len() - 2] {
            assert!(matches!(StateFile::parse(&whole[..length], at()), Err(Error::Malformed { .. })));
        }
        let long = vec![b' '; usize::try_from(MAX_STATE).unwrap() + 1];
        assert!(matches!(StateFile::parse(&long, at()), Err(Error::Malformed { .. })));
    }

    #[test]
    fn a_file_is_replaced_with_the_start_of_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        fs::write(&path, SAMPLES[1].1).unwrap();
        let me = rustix::process::getpid();
        update(&path, me).unwrap();
        let after: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(after["init_process_pid"], me.as_raw_nonzero().get());
        assert_eq!(after["init_process_start"], procfs::stat(me).unwrap().start_time);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_update_leaves_the_file_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        fs::write(&path, SAMPLES[1].1).unwrap();
        let nobody = Pid::from_raw(i32::MAX).unwrap();
        assert!(matches!(update(&path, nobody), Err(Error::Process { .. })));
        assert_eq!(fs::read(&path).unwrap(), SAMPLES[1].1);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(update(&link, rustix::process::getpid()), Err(Error::Io { action: "read", .. })));
    }

    #[test]
    fn the_path_is_containerd_s() {
        let path = path(Path::new("/run/containerd/runc"), "k8s.io", "agent");
        assert_eq!(path, Path::new("/run/containerd/runc/k8s.io/agent/state.json"));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = StateFile::parse(&bytes, at());
        }

        #[test]
        fn a_byte_changed_is_refused_or_leaves_a_state(at_index: proptest::sample::Index, byte: u8) {
            let mut bytes = SAMPLES[2].1.to_vec();
            let position = at_index.index(bytes.len());
            bytes[position] = byte;
            if let Ok(state) = StateFile::parse(&bytes, at()) {
                let again = StateFile::parse(&state.to_bytes(), at()).unwrap();
                proptest::prop_assert_eq!(again, state);
            }
        }
    }
}
