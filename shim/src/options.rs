//! The shim's options, as containerd's configuration has them.
//!
//! CRI passes the table `options` of a runtime as TOML text, `ctr run --runtime-config-path` the path of a TOML file;
//! both come as `runtimeoptions.v1.Options`. What is not set has a default; what is not known is an error.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim::protos::{
    protobuf::{CodedInputStream, Message, well_known_types::any::Any},
    shim::oci::Options as RuncOptions,
};
use criu_hooks::{
    inspect::Policy,
    pager::{self, LazyOptions},
};
use serde::{Deserialize, Serialize};

use crate::{
    daemon::PAGER,
    probe_commands::Commands,
    timers,
    traffic::{Prefix, Sources},
};

/// Where the options are kept in the bundle, for the action `delete`, which gets none.
const FILE: &str = "agentcube-options.json";
/// The largest options file that is read.
const MAX_FILE: u64 = 1 << 20;
/// A type that an `Any` of options may have, by the last part of its URL.
const GENERIC: [&str; 3] =
    ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options", "containerd.runtimeoptions.v1.Options"];
/// The options of containerd's own runc shim.
const RUNC: &str = "containerd.runc.v1.Options";

/// How much the shim logs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Only what went wrong.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens to containers.
    #[default]
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        })
    }
}

/// Where CRIU works.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CriuMode {
    /// Inside the pod's namespaces, which is fast; outside of them where that is not possible.
    #[default]
    PodNamespaces,
    /// Outside of them always: images hold the contents of every tmpfs.
    Classic,
}

impl From<CriuMode> for criu_hooks::image::Mode {
    fn from(mode: CriuMode) -> Self {
        match mode {
            CriuMode::PodNamespaces => Self::PodNamespaces,
            CriuMode::Classic => Self::Classic,
        }
    }
}

/// What becomes of established TCP connections when an agent is checkpointed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Connections {
    /// Idle ones are closed, any other keeps the agent at a shallower depth.
    #[default]
    Auto,
    /// Each keeps the agent at a shallower depth.
    Keep,
    /// Each may be closed.
    Close,
}

/// The annotation of a pod or container that overrides [`Options::connections`].
const CONNECTIONS: &str = "agentcube.volcano.sh/connections";

/// What becomes of the kubelet's probes of a checkpointed agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probes {
    /// They wake it, as whatever comes.
    #[default]
    Wake,
    /// TCP, HTTP and gRPC probes are answered for it.
    Answer,
}

/// The annotation of a pod or container that overrides [`Options::probes`].
const PROBES: &str = "agentcube.volcano.sh/probes";

/// The annotation of a pod or container that overrides [`Options::probe_commands`], in JSON.
const PROBE_COMMANDS: &str = "agentcube.volcano.sh/probe-commands";

/// What becomes of the timers of a checkpointed agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Timers {
    /// One that is due late enough wakes it in time; time asleep counts.
    #[default]
    Auto,
    /// The next wakes it in time; time asleep counts.
    Wake,
    /// They stand still, and go on with what remained.
    Resume,
}

/// The annotation of a pod or container that overrides [`Options::timers`].
const TIMERS: &str = "agentcube.volcano.sh/timers";

/// The options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The OCI runtime: a name on the PATH, or an absolute path.
    pub runc_binary: PathBuf,
    /// Where the OCI runtime keeps its state, above containerd's namespaces.
    pub runc_root: PathBuf,
    /// CRIU: a name on the PATH, or an absolute path.
    pub criu_binary: PathBuf,
    /// Where CRIU works.
    pub criu_mode: CriuMode,
    /// Start CRIU for the next wake as soon as an agent sleeps.
    pub criu_started_ahead: bool,
    /// How much an agent's tmpfs mounts may hold, in MiB and in all, to stay in memory while it sleeps; the largest
    /// beyond that go into the image.
    pub memory_limit_mib: u64,
    /// Where images of sleeping agents are kept.
    pub image_dir: PathBuf,
    /// How many seconds after it was written to the disk an image may stay in the page cache; without it, until the
    /// kernel needs the memory.
    pub image_cache_seconds: Option<u64>,
    /// How many seconds after its checkpoint an agent's files may stay in the page cache that it is charged with.
    pub file_cache_seconds: u32,
    /// Leave limits out whose cgroup v2 controller the node lacks, rather than refuse the container.
    pub ignore_missing_controllers: bool,
    /// Let runc use systemd for cgroups.
    pub systemd_cgroup: bool,
    /// Let a woken agent run before all of its memory is there.
    pub lazy_restore: bool,
    /// With less memory than this, in MiB, all of it is restored first.
    pub lazy_restore_min_mib: u64,
    /// Write memory in advance, while the agent still runs, where the kernel tracks what is written afterwards.
    pub pre_dump: bool,
    /// With less memory than this, in MiB, nothing is written in advance.
    pub pre_dump_min_mib: u64,
    /// The most memory, in MiB, that is remembered of what an agent needs at once after a wake; 0 for none.
    pub working_set_max_mib: u64,
    /// How long pushing a frozen agent's memory out to swap may take, in seconds.
    pub reclaim_timeout: u32,
    /// Read back at once what was pushed out when the agent wakes, rather than when it is touched.
    pub prefetch_on_wake: bool,
    /// How much is logged.
    pub log_level: LogLevel,
    /// What becomes of established TCP connections when an agent is checkpointed.
    pub connections: Connections,
    /// With [`Connections::Auto`]: for how many seconds no byte may have come or gone before a connection is closed.
    pub connection_idle_seconds: u32,
    /// What becomes of the kubelet's probes of a checkpointed agent.
    pub probes: Probes,
    /// With [`Probes::Answer`]: the addresses that probes come from; when empty, the default gateways of the pod.
    pub probe_sources: Vec<Prefix>,
    /// With [`Probes::Answer`]: the commands of exec probes, each with its arguments.
    pub probe_commands: Commands,
    /// What becomes of the timers of a checkpointed agent.
    pub timers: Timers,
    /// With [`Timers::Auto`]: in how many seconds at least a timer must be due to wake it.
    pub timer_horizon_seconds: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            runc_binary: "runc".into(),
            runc_root: "/run/containerd/runc".into(),
            criu_binary: "criu".into(),
            criu_mode: CriuMode::default(),
            criu_started_ahead: false,
            memory_limit_mib: 16,
            image_dir: "/var/lib/agentcube/images".into(),
            image_cache_seconds: None,
            file_cache_seconds: 10,
            ignore_missing_controllers: false,
            systemd_cgroup: false,
            lazy_restore: true,
            lazy_restore_min_mib: pager::LEAST_BYTES >> 20,
            pre_dump: false,
            pre_dump_min_mib: 64,
            working_set_max_mib: pager::WORKING_SET_BYTES >> 20,
            reclaim_timeout: 10,
            prefetch_on_wake: false,
            log_level: LogLevel::default(),
            connections: Connections::default(),
            connection_idle_seconds: 60,
            probes: Probes::default(),
            probe_sources: Vec::new(),
            probe_commands: Commands::default(),
            timers: Timers::default(),
            timer_horizon_seconds: 90,
        }
    }
}

/// What is wrong with the options.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("runtime options in {origin}: {reason}")]
    Toml {
        /// Where they came from.
        origin: String,
        /// What is wrong, with the key's name.
        reason: String,
    },
    /// A path that is not absolute.
    #[error("runtime options in {origin}: {key} must be an absolute path{or_name}, not {value:?}")]
    Relative {
        /// Where they came from.
        origin: String,
        /// The key.
        key: &'static str,
        /// What else would be right.
        or_name: &'static str,
        /// Its value.
        value: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read the runtime options in {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write the runtime options to {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The message cannot be decoded.
    #[error("runtime options of type {type_url} cannot be decoded: {reason}")]
    Decode {
        /// Its type.
        type_url: String,
        /// Why.
        reason: String,
    },
    /// Not a type of options that this shim takes.
    #[error(
        "runtime options of type {0} are not known: use a runtime_type of io.containerd.agentcube.v1 with TOML options"
    )]
    UnknownType(String),
    /// An option of containerd's runc shim that this shim cannot honour.
    #[error("the runc option {0} is not supported by io.containerd.agentcube.v1: remove it")]
    UnsupportedRunc(&'static str),
}

impl Options {
    /// Reads TOML text that came from `origin`.
    ///
    /// # Errors
    /// [`OptionsError::Toml`], [`OptionsError::Relative`].
    pub fn from_toml(text: &str, origin: &str) -> Result<Self, OptionsError> {
        let options: Self = toml::from_str(text).map_err(|error| OptionsError::Toml {
            origin: origin.to_owned(),
            reason: error.to_string().trim_end().to_owned(),
        })?;
        options.check(origin)?;
        Ok(options)
    }

    /// How an agent's memory is to come back; none for all at once.
    pub fn lazy(&self) -> Option<LazyOptions> {
        self.lazy_restore.then(|| LazyOptions {
            least_bytes: self.lazy_restore_min_mib.saturating_mul(1 << 20),
            working_set_bytes: self.working_set_max_mib.saturating_mul(1 << 20),
            // Itself, also when another version has been put in its place meanwhile.
            ..LazyOptions::new("/proc/self/exe", [PAGER])
        })
    }

    fn check(&self, origin: &str) -> Result<(), OptionsError> {
        let relative = |key, or_name, value: &Path| OptionsError::Relative {
            origin: origin.to_owned(),
            key,
            or_name,
            value: value.to_owned(),
        };
        for (key, value) in [("image_dir", &self.image_dir), ("runc_root", &self.runc_root)] {
            if !value.is_absolute() {
                return Err(relative(key, "", value));
            }
        }
        for (key, value) in [("runc_binary", &self.runc_binary), ("criu_binary", &self.criu_binary)] {
            let is_name = value.components().count() == 1 && value.file_name().is_some();
            if !value.is_absolute() && !is_name {
                return Err(relative(key, " or a name to be found on the PATH", value));
            }
        }
        Ok(())
    }

    /// Decodes the options of a request; defaults where there are none.
    ///
    /// # Errors
    /// [`OptionsError`], which names the key or the type.
    pub fn from_any(any: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        match any.type_url.rsplit('/').next() {
            Some(name) if GENERIC.contains(&name) => {
                let decoded = Generic::decode(&any.value).map_err(|error| OptionsError::Decode {
                    type_url: any.type_url.clone(),
                    reason: error.to_string(),
                })?;
                decoded.resolve()
            }
            Some(RUNC) => {
                let runc = RuncOptions::parse_from_bytes(&any.value).map_err(|error| {
                    OptionsError::Decode { type_url: any.type_url.clone(), reason: error.to_string() }
                })?;
                Self::from_runc(&runc)
            }
            _ => Err(OptionsError::UnknownType(any.type_url.clone())),
        }
    }

    /// Finds the options among what containerd passes to the action `start`.
    ///
    /// # Errors
    /// As [`Self::from_any`].
    pub fn from_extensions(extensions: &[Any]) -> Result<Self, OptionsError> {
        let is_ours = |any: &&Any| {
            any.type_url.rsplit('/').next().is_some_and(|name| GENERIC.contains(&name) || name == RUNC)
        };
        Self::from_any(extensions.iter().find(is_ours))
    }

    /// What `ctr run` and configurations made for containerd's own shim pass.
    fn from_runc(runc: &RuncOptions) -> Result<Self, OptionsError> {
        let mut options = Self { systemd_cgroup: runc.systemd_cgroup, ..Self::default() };
        if !runc.binary_name.is_empty() {
            options.runc_binary = PathBuf::from(&runc.binary_name);
        }
        if !runc.root.is_empty() {
            options.runc_root = PathBuf::from(&runc.root);
        }
        for (set, name) in [
            (runc.no_pivot_root, "NoPivotRoot"),
            (!runc.criu_image_path.is_empty(), "CriuImagePath"),
            (!runc.criu_work_path.is_empty(), "CriuWorkPath"),
        ] {
            if set {
                return Err(OptionsError::UnsupportedRunc(name));
            }
        }
        options.check(RUNC)?;
        Ok(options)
    }

    /// What the annotations of a container override.
    ///
    /// # Errors
    /// [`OptionsError::Toml`] when one has a value that it cannot have.
    pub fn annotated(mut self, annotations: Option<&HashMap<String, String>>) -> Result<Self, OptionsError> {
        let value = |name| annotations.and_then(|annotations| annotations.get(name));
        let wrong = |name, value: &String, right| {
            let (origin, reason) =
                (format!("the annotation {name}"), format!("{value:?} is none of {right}"));
            Err(OptionsError::Toml { origin, reason })
        };
        if let Some(value) = value(CONNECTIONS) {
            self.connections = match value.as_str() {
                "auto" => Connections::Auto,
                "keep" => Connections::Keep,
                "close" => Connections::Close,
                _ => return wrong(CONNECTIONS, value, "auto, keep, close"),
            };
        }
        if let Some(value) = value(PROBES) {
            self.probes = match value.as_str() {
                "wake" => Probes::Wake,
                "answer" => Probes::Answer,
                _ => return wrong(PROBES, value, "wake, answer"),
            };
        }
        if let Some(value) = value(PROBE_COMMANDS) {
            self.probe_commands = serde_json::from_str(value).map_err(|error| OptionsError::Toml {
                origin: format!("the annotation {PROBE_COMMANDS}"),
                reason: format!("it must be like [[\"cat\", \"/tmp/healthy\"]]: {error}"),
            })?;
        }
        if let Some(value) = value(TIMERS) {
            self.timers = match value.as_str() {
                "auto" => Timers::Auto,
                "wake" => Timers::Wake,
                "resume" => Timers::Resume,
                _ => return wrong(TIMERS, value, "auto, wake, resume"),
            };
        }
        Ok(self)
    }

    /// What becomes of established connections.
    pub fn connection_policy(&self) -> Policy {
        match self.connections {
            Connections::Auto => {
                Policy::Auto { idle: Duration::from_secs(self.connection_idle_seconds.into()) }
            }
            Connections::Keep => Policy::Keep,
            Connections::Close => Policy::Close,
        }
    }

    /// What becomes of its timers when an agent is checkpointed.
    pub fn timer_policy(&self) -> timers::Policy {
        match self.timers {
            Timers::Auto => {
                timers::Policy::Auto { horizon: Duration::from_secs(self.timer_horizon_seconds.into()) }
            }
            Timers::Wake => timers::Policy::Wake,
            Timers::Resume => timers::Policy::Resume,
        }
    }

    /// Where probes come from that are answered for a checkpointed agent; nothing when they wake it.
    pub fn answered_probes(&self) -> Option<Sources> {
        match (self.probes, self.probe_sources.as_slice()) {
            (Probes::Wake, _) => None,
            (Probes::Answer, []) => Some(Sources::Gateways),
            (Probes::Answer, listed) => Some(Sources::Listed(listed.to_vec())),
        }
    }

    /// The commands of exec probes that are answered for a sleeping agent; nothing when they wake it.
    pub fn answered_commands(&self) -> Option<Commands> {
        (self.probes == Probes::Answer).then(|| self.probe_commands.clone())
    }

    /// Keeps the options in `bundle`.
    ///
    /// # Errors
    /// [`OptionsError::Write`].
    pub fn save(&self, bundle: &Path) -> Result<(), OptionsError> {
        let path = bundle.join(FILE);
        let text = serde_json::to_vec(self).map_err(io::Error::other);
        text.and_then(|text| fs::write(&path, text)).map_err(|source| OptionsError::Write { path, source })
    }

    /// Reads what [`Self::save`] kept; defaults if nothing was.
    ///
    /// # Errors
    /// [`OptionsError::Read`], [`OptionsError::Toml`].
    pub fn load(bundle: &Path) -> Result<Self, OptionsError> {
        let path = bundle.join(FILE);
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            fs::File::open(&path)?.take(MAX_FILE).read_to_end(&mut text)?;
            Ok(text)
        };
        let text = match read() {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(OptionsError::Read { path, source }),
        };
        serde_json::from_slice(&text).map_err(|error| OptionsError::Toml {
            origin: path.display().to_string(),
            reason: error.to_string(),
        })
    }
}

/// `runtimeoptions.v1.Options`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Generic {
    config_path: String,
    config_body: Vec<u8>,
}

impl Generic {
    const CONFIG_PATH: u32 = 2;
    const CONFIG_BODY: u32 = 3;

    /// Decodes the message by hand: no crate carries it, and it has three fields.
    fn decode(bytes: &[u8]) -> containerd_shim::protos::protobuf::Result<Self> {
        let mut message = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match (tag >> 3, tag & 7) {
                (Self::CONFIG_PATH, 2) => message.config_path = input.read_string()?,
                (Self::CONFIG_BODY, 2) => message.config_body = input.read_bytes()?,
                (_, 0) => drop(input.read_raw_varint64()?),
                (_, 1) => drop(input.read_fixed64()?),
                (_, 2) => drop(input.read_bytes()?),
                (_, 5) => drop(input.read_fixed32()?),
                (_, wire) => {
                    let reason = format!("wire type {wire} is not allowed here");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, reason).into());
                }
            }
        }
        Ok(message)
    }

    fn resolve(self) -> Result<Options, OptionsError> {
        if !self.config_body.is_empty() {
            let text = String::from_utf8_lossy(&self.config_body);
            return Options::from_toml(&text, "containerd's configuration");
        }
        if self.config_path.is_empty() {
            return Ok(Options::default());
        }
        let path = PathBuf::from(self.config_path);
        let read = || -> io::Result<String> {
            if fs::metadata(&path)?.len() > MAX_FILE {
                return Err(io::Error::other(format!("it has more than {MAX_FILE} bytes")));
            }
            fs::read_to_string(&path)
        };
        match read() {
            Ok(text) => Options::from_toml(&text, &path.display().to_string()),
            Err(source) => Err(OptionsError::Read { path, source }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(type_url: &str, path: &str, body: &str) -> Any {
        let mut value = Vec::new();
        for (field, text) in [(1u8, "toml"), (2, path), (3, body)] {
            if !text.is_empty() {
                value.extend([field << 3 | 2, u8::try_from(text.len()).unwrap()]);
                value.extend(text.as_bytes());
            }
        }
        Any { type_url: type_url.to_owned(), value, ..Default::default() }
    }

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(Options::from_any(None).unwrap(), Options::default());
        assert_eq!(
            Options::from_any(Some(&message("runtimeoptions.v1.Options", "", ""))).unwrap(),
            Options::default()
        );
        assert_eq!(Options::from_extensions(&[]).unwrap(), Options::default());
    }

    #[test]
    fn toml_comes_in_the_message_or_by_its_path() {
        let text = "image_dir = \"/images\"\nlog_level = \"debug\"\nignore_missing_controllers = true";
        let body =
            Options::from_any(Some(&message("type.googleapis.com/runtimeoptions.v1.Options", "", text)))
                .unwrap();
        assert_eq!(body.image_dir, Path::new("/images"));
        assert_eq!(body.log_level, LogLevel::Debug);
        assert!(body.ignore_missing_controllers);
        assert_eq!((body.criu_mode, body.memory_limit_mib), (CriuMode::PodNamespaces, 16));
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(Options::from_any(Some(&message("runtimeoptions.v1.Options", path, ""))).unwrap(), body);
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error =
            Options::from_toml("criu_path = \"/usr/bin/criu\"", "/etc/x.toml").unwrap_err().to_string();
        assert!(error.contains("/etc/x.toml") && error.contains("criu_path"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_named() {
        for (text, word) in [
            ("image_dir = 3", "image_dir"),
            ("log_level = \"loud\"", "loud"),
            ("criu_mode = \"fast\"", "fast"),
            ("criu_started_ahead = 1", "criu_started_ahead"),
            ("memory_limit_mib = -1", "memory_limit_mib"),
            ("image_dir = \"images\"", "image_dir"),
            ("criu_binary = \"bin/criu\"", "criu_binary"),
            ("criu_binary = \"\"", "criu_binary"),
        ] {
            let error = Options::from_toml(text, "here").unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn modes_and_limits_are_read() {
        let options = Options::from_toml("criu_mode = \"classic\"\nmemory_limit_mib = 0", "here").unwrap();
        assert_eq!((options.criu_mode, options.memory_limit_mib), (CriuMode::Classic, 0));
        let options = Options::from_toml("criu_mode = \"pod-namespaces\"", "here").unwrap();
        assert_eq!(options, Options::default());
    }

    #[test]
    fn an_annotation_overrides_what_becomes_of_connections() {
        let annotated = |value: &str| {
            let annotations = HashMap::from([(CONNECTIONS.to_owned(), value.to_owned())]);
            Options::default().annotated(Some(&annotations))
        };
        assert_eq!(annotated("close").unwrap().connection_policy(), Policy::Close);
        assert_eq!(annotated("keep").unwrap().connection_policy(), Policy::Keep);
        assert_eq!(annotated("auto").unwrap(), Options::default());
        assert!(annotated("drop").unwrap_err().to_string().contains("agentcube.volcano.sh/connections"));
        let options =
            Options::from_toml("connections = \"auto\"\nconnection_idle_seconds = 5", "here").unwrap();
        assert_eq!(options.connection_policy(), Policy::Auto { idle: Duration::from_secs(5) });
    }

    #[test]
    fn an_annotation_overrides_what_becomes_of_timers() {
        let annotated = |options: Options, value: &str| {
            options.annotated(Some(&HashMap::from([(TIMERS.to_owned(), value.to_owned())])))
        };
        let auto = |seconds| timers::Policy::Auto { horizon: Duration::from_secs(seconds) };
        assert_eq!(Options::default().timer_policy(), auto(90));
        let options = Options::from_toml("timers = \"resume\"\ntimer_horizon_seconds = 60", "x").unwrap();
        assert_eq!(options.timer_policy(), timers::Policy::Resume);
        assert_eq!(annotated(options.clone(), "wake").unwrap().timer_policy(), timers::Policy::Wake);
        assert_eq!(annotated(options.clone(), "auto").unwrap().timer_policy(), auto(60));
        let error = annotated(options, "never").unwrap_err().to_string();
        assert!(error.contains("agentcube.volcano.sh/timers"), "{error}");
        assert!(Options::from_toml("timers = \"never\"", "x").unwrap_err().to_string().contains("never"));
    }

    #[test]
    fn probes_are_answered_where_the_options_or_an_annotation_say_so() {
        let annotated = |options: Options, value: &str| {
            options.annotated(Some(&HashMap::from([(PROBES.to_owned(), value.to_owned())])))
        };
        assert_eq!(Options::default().answered_probes(), None);
        assert_eq!(
            annotated(Options::default(), "answer").unwrap().answered_probes(),
            Some(Sources::Gateways)
        );
        let options =
            Options::from_toml("probes = \"answer\"\nprobe_sources = [\"10.0.0.7\", \"fd00::/64\"]", "x");
        let options = options.unwrap();
        let listed = ["10.0.0.7", "fd00::/64"].map(|text| text.parse().unwrap()).to_vec();
        assert_eq!(options.answered_probes(), Some(Sources::Listed(listed)));
        assert_eq!(annotated(options.clone(), "wake").unwrap().answered_probes(), None);
        let bundle = tempfile::tempdir().unwrap();
        options.save(bundle.path()).unwrap();
        assert_eq!(Options::load(bundle.path()).unwrap(), options);
        let error = annotated(options, "ignore").unwrap_err().to_string();
        assert!(error.contains("agentcube.volcano.sh/probes"), "{error}");
        let error = Options::from_toml("probe_sources = [\"node\"]", "x").unwrap_err().to_string();
        assert!(error.contains("node"), "{error}");
    }

    #[test]
    fn commands_of_probes_are_answered_where_probes_are() {
        let commands = |words: &[&str]| {
            Commands::try_from(vec![words.iter().map(ToString::to_string).collect::<Vec<_>>()]).unwrap()
        };
        let toml = "probes = \"answer\"\nprobe_commands = [[\"cat\", \"/tmp/healthy\"]]";
        let options = Options::from_toml(toml, "x").unwrap();
        assert_eq!(options.answered_commands(), Some(commands(&["cat", "/tmp/healthy"])));
        let annotated = |value: &str| {
            options.clone().annotated(Some(&HashMap::from([(PROBE_COMMANDS.to_owned(), value.to_owned())])))
        };
        assert_eq!(annotated("[[\"true\"]]").unwrap().answered_commands(), Some(commands(&["true"])));
        assert_eq!(annotated("[]").unwrap().answered_commands(), Some(Commands::default()));
        for wrong in ["true", "[\"true\"]", "[[]]"] {
            let error = annotated(wrong).unwrap_err().to_string();
            assert!(error.contains("agentcube.volcano.sh/probe-commands"), "{wrong}: {error}");
        }
        assert_eq!(Options { probes: Probes::Wake, ..options }.answered_commands(), None);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let missing = message("runtimeoptions.v1.Options", "/nonexistent/shim.toml", "");
        let error = Options::from_any(Some(&missing)).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/shim.toml"), "{error}");
    }

    #[test]
    fn options_of_containerds_runc_shim_are_taken_or_refused_by_name() {
        let runc = |options: &RuncOptions| Any {
            type_url: RUNC.to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let taken =
            RuncOptions { binary_name: "/usr/sbin/runc".into(), systemd_cgroup: true, ..Default::default() };
        let options = Options::from_any(Some(&runc(&taken))).unwrap();
        assert_eq!(options.runc_binary, Path::new("/usr/sbin/runc"));
        assert!(options.systemd_cgroup);
        let refused = RuncOptions { no_pivot_root: true, ..Default::default() };
        let error = Options::from_any(Some(&runc(&refused))).unwrap_err().to_string();
        assert!(error.contains("NoPivotRoot"), "{error}");
        let foreign = Any { type_url: "io.kata.Options".into(), value: vec![1], ..Default::default() };
        assert!(matches!(Options::from_any(Some(&foreign)), Err(OptionsError::UnknownType(_))));
    }

    #[test]
    fn what_is_kept_in_the_bundle_is_read_again() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Options::load(bundle.path()).unwrap(), Options::default());
        let options = Options { image_dir: "/elsewhere".into(), ..Options::default() };
        options.save(bundle.path()).unwrap();
        assert_eq!(Options::load(bundle.path()).unwrap(), options);
    }

    proptest! {
        /// What is kept in a bundle is what was there, and nothing else is taken for it.
        #[test]
        fn what_is_saved_is_loaded_and_other_bytes_are_refused(
            image_dir in "/[a-z/]{0,20}",
            ignore: bool,
            level in prop::sample::select(vec![LogLevel::Error, LogLevel::Info, LogLevel::Trace]),
            bytes: Vec<u8>,
        ) {
            let bundle = tempfile::tempdir().unwrap();
            let options = Options {
                image_dir: image_dir.into(),
                ignore_missing_controllers: ignore,
                log_level: level,
                ..Options::default()
            };
            options.save(bundle.path()).unwrap();
            prop_assert_eq!(Options::load(bundle.path()).unwrap(), options);
            fs::write(bundle.path().join(FILE), bytes).unwrap();
            let refused = matches!(Options::load(bundle.path()), Err(OptionsError::Toml { .. }));
            prop_assert!(refused);
        }

        #[test]
        fn arbitrary_text_is_options_or_an_error_that_names_its_origin(
            text in "\\PC{0,60}|[a-z_]{1,20} = (\"[a-z/]{0,9}\"|true|[0-9]{1,3})\n",
        ) {
            if let Err(error) = Options::from_toml(&text, "/etc/here.toml") {
                prop_assert!(error.to_string().contains("/etc/here.toml"), "{}", error);
            }
        }

        /// Whatever bytes come, decoding ends with options or an error.
        #[test]
        fn arbitrary_bytes_never_panic(value in prop::collection::vec(any::<u8>(), 0..200)) {
            let any = Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() };
            let _ = Options::from_any(Some(&any));
        }
    }
}
