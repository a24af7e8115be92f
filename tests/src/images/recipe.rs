//! What each image is made of.

use std::path::Path;

use serde_json::{Value, json};

use super::layer::Layer;
use super::{Image, ImageError};

/// Parts of Python's library that no agent uses; without them the image is half as big.
const PYTHON_UNWANTED: &[&str] = &[
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
    "venv",
    "_pyrepl",
    "sitecustomize.py",
    "EXTERNALLY-MANAGED",
];

/// Where Debian's node keeps the parts of itself that are written in JavaScript.
const NODE_LIBRARIES: &str = "/usr/share/nodejs";

/// How to make an image. Its debug form is part of the key under which the image is cached, so all that decides the
/// contents is in here.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) name: &'static str,
    entrypoint: &'static [&'static str],
    env: &'static [&'static str],
    /// Texts that become executable files.
    texts: &'static [(&'static str, &'static str)],
    programs: &'static [&'static str],
    /// Commands that busybox provides.
    busybox: &'static [&'static str],
    python: bool,
    node: bool,
}

const PATH: &str = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

const COMMANDS: &[&str] = &[
    "awk", "cat", "cp", "cut", "date", "dd", "df", "echo", "env", "false", "find", "free", "grep", "head",
    "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mount", "mv", "nc", "ps", "rm", "sed", "seq",
    "sleep", "sort", "stty", "sync", "tail", "top", "touch", "tr", "true", "tty", "uname", "usleep", "wc",
    "wget",
];

impl Recipe {
    pub(super) fn of(image: Image) -> Self {
        let nothing = Self {
            name: "",
            entrypoint: &[],
            env: &[PATH],
            texts: &[],
            programs: &[],
            busybox: COMMANDS,
            python: false,
            node: false,
        };
        match image {
            Image::Counter => Self {
                name: "counter",
                entrypoint: &["/counter.sh"],
                texts: &[("/counter.sh", include_str!("../../agents/counter.sh"))],
                ..nothing
            },
            Image::Python => Self {
                name: "python-agent",
                entrypoint: &["/usr/bin/python3", "/agent.py"],
                env: &[PATH, "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"],
                texts: &[
                    ("/agent.py", include_str!("../../agents/agent.py")),
                    ("/grpc_health.py", include_str!("../../agents/grpc_health.py")),
                ],
                programs: &["/usr/bin/python3"],
                python: true,
                ..nothing
            },
            Image::Shell => Self {
                name: "shell",
                entrypoint: &["/usr/bin/bash", "--norc", "--noprofile", "-i"],
                env: &[PATH, "PS1=agent$ ", "HISTFILE=/root/.bash_history"],
                programs: &["/usr/bin/bash"],
                ..nothing
            },
            Image::NodeJs => Self {
                name: "node-agent-js",
                entrypoint: &["/usr/bin/node", "/agent.js"],
                texts: &[("/agent.js", include_str!("../../agents/agent.js"))],
                programs: &["/usr/bin/node"],
                node: true,
                ..nothing
            },
            Image::Memory => Self {
                name: "memory",
                entrypoint: &["/usr/bin/python3", "/memory.py"],
                env: &[PATH, "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1"],
                texts: &[("/memory.py", include_str!("../../agents/memory.py"))],
                programs: &["/usr/bin/python3"],
                python: true,
                ..nothing
            },
            Image::Pause => Self {
                name: "pause",
                entrypoint: &["/pause.sh"],
                texts: &[("/pause.sh", include_str!("../../agents/pause.sh"))],
                ..nothing
            },
        }
    }

    pub(super) fn config(&self) -> Value {
        json!({ "Entrypoint": self.entrypoint, "Env": self.env, "WorkingDir": "/" })
    }

    pub(super) fn layer<'a>(&self, rootfs: &'a Path) -> Result<Layer<'a>, ImageError> {
        let mut layer = Layer::new(rootfs);
        layer.file("/usr/bin/busybox", "/usr/bin/busybox")?;
        layer.link("/usr/bin/sh", "busybox");
        for command in self.busybox {
            layer.link(&format!("/usr/bin/{command}"), "busybox");
        }
        for program in self.programs {
            layer.program(program)?;
        }
        for (path, text) in self.texts {
            layer.text(path, text);
        }
        if self.python {
            layer.folder(&python_library(rootfs)?, PYTHON_UNWANTED)?;
        }
        if self.node {
            layer.folder(NODE_LIBRARIES, &["npm", "corepack"])?;
        }
        Ok(layer)
    }
}

/// The folder of Python's library, whatever its version.
fn python_library(rootfs: &Path) -> Result<String, ImageError> {
    let program = rootfs.join("usr/bin/python3");
    let lacking = || ImageError::Lacking { path: "/usr/bin/python3".into(), rootfs: rootfs.into() };
    // Debian's python3 is a link to the program of one version, and the library is called like that.
    let version = std::fs::read_link(program).map_err(|_| lacking())?;
    version.file_name().map(|name| format!("/usr/lib/{}", name.to_string_lossy())).ok_or_else(lacking)
}
