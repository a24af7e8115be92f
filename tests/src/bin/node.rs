//! The node harness's command line: a node to look around in. Tests use the library behind it.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use agentcube_tests::node::{self, Entrance, Node, NodeError, NodeOptions};
use agentcube_tests::vm::{self, GuestCommand, VmOptions};
use agentcube_tests::{old_runc, rootfs};
use anyhow::Context as _;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Runs container nodes (containerd, runc, CRIU) in namespaces of this machine")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a node and keep it until this command ends or `down` is called
    Up {
        /// Keep the images of sleeping agents in memory, not on disk
        #[arg(long)]
        images_in_memory: bool,
        /// How much containerd and its shims log
        #[arg(long, default_value = "info")]
        log_level: String,
        /// A file with the shim's options, in place of the default ones
        #[arg(long)]
        shim_toml: Option<PathBuf>,
    },
    /// Run a command on a node: exec [NODE] COMMAND…
    Exec {
        /// The node's name, which may be left out when only one is running, and the command
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// Open a shell on a node
    Shell {
        /// The node's name, which may be left out when only one is running
        node: Option<String>,
    },
    /// End a node
    Down {
        /// The node's name, which may be left out when only one is running
        node: Option<String>,
    },
    /// Build the node's root file system unless that is done, and print where it is
    Rootfs,
    /// Work with virtual machines, each a node with every controller, swap and a kernel of its own
    Vm {
        #[command(subcommand)]
        verb: VmVerb,
    },
    #[command(hide = true)]
    Supervise,
    #[command(hide = true)]
    Init { plan: String },
    #[command(hide = true)]
    Enter {
        init: u32,
        cgroup: PathBuf,
        #[arg(required = true, last = true)]
        argv: Vec<OsString>,
    },
}

#[derive(Subcommand)]
enum VmVerb {
    /// Run a command as root in a new virtual machine: a program of this build by its path, or one of the node's
    Run {
        /// The release of Debian whose kernel boots
        #[arg(long, env = "AGENTCUBE_VM_KERNEL", default_value = vm::KERNEL)]
        kernel: String,
        /// The memory of the virtual machine in MiB
        #[arg(long, env = "AGENTCUBE_VM_MEMORY", default_value_t = VmOptions::default().memory_mib)]
        memory: u32,
        /// How many seconds all of it may take
        #[arg(long, env = "AGENTCUBE_VM_TIMEOUT", default_value_t = VmOptions::default().timeout.as_secs())]
        timeout: u64,
        /// Boot systemd as the first process
        #[arg(long, env = "AGENTCUBE_VM_SYSTEMD")]
        systemd: bool,
        /// The command
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Run the suites of a list, several in each virtual machine and as many machines at a time as fit
    Test {
        /// The list: machines with their kernels and suites, in TOML
        list: PathBuf,
        /// Run only the machines with the kernel of this release of Debian
        #[arg(long, env = "AGENTCUBE_VM_KERNEL")]
        kernel: Option<String>,
        /// The memory of each virtual machine in MiB
        #[arg(long, env = "AGENTCUBE_VM_MEMORY", default_value_t = VmOptions::default().memory_mib)]
        memory: u32,
        /// How many seconds each virtual machine may take
        #[arg(long, env = "AGENTCUBE_VM_TIMEOUT", default_value_t = 1200)]
        timeout: u64,
    },
    /// Make the disks of virtual machines unless that is done
    Setup {
        /// The releases of Debian whose kernels are fetched
        #[arg(long = "kernel", env = "AGENTCUBE_VM_KERNEL", value_delimiter = ',', default_values = vm::KERNELS)]
        kernels: Vec<String>,
    },
    #[command(hide = true)]
    Init,
}

fn main() -> ExitCode {
    let run = match Arguments::parse().verb {
        Verb::Up { images_in_memory, log_level, shim_toml } => up(!images_in_memory, log_level, shim_toml),
        Verb::Exec { words } => exec(words),
        Verb::Shell { node } => shell(node),
        Verb::Down { node } => find(node).and_then(|entrance| Ok(node::down(&entrance)?)).map(|()| 0),
        Verb::Rootfs => build(),
        Verb::Vm { verb } => virtual_machine(verb),
        Verb::Supervise => node::supervise().map(|()| 0).map_err(Into::into),
        Verb::Init { plan } => node::init(&plan).map(|()| 0).map_err(Into::into),
        Verb::Enter { init, cgroup, argv } => match node::enter(init, &cgroup, &argv) {
            Ok(code) => Ok(code),
            // As shells do: commands that can't be started have a status of their own.
            Err(error) => {
                eprintln!("{error}");
                Ok(127)
            }
        },
    };
    match run {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn up(images_on_disk: bool, log_level: String, shim_toml: Option<PathBuf>) -> anyhow::Result<i32> {
    let mut options = NodeOptions { images_on_disk, log_level, ..NodeOptions::default() };
    if let Some(path) = shim_toml {
        options.shim_toml =
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    }
    let mut node = Node::start(options)?;
    println!("{}", node.name());
    if std::io::stdout().is_terminal() {
        eprintln!(
            "The node is up until Ctrl-C. In another terminal: node exec ctr version, node shell, node down."
        );
    }
    node.wait_for_end()?;
    Ok(0)
}

fn exec(mut words: Vec<OsString>) -> anyhow::Result<i32> {
    let first = words.first().and_then(|word| word.to_str()).unwrap_or_default();
    let named = Entrance::all().into_iter().any(|entrance| entrance.name == first);
    let node = named.then(|| words.remove(0)).and_then(|word| word.into_string().ok());
    anyhow::ensure!(!words.is_empty(), "no command given");
    run(&find(node)?, words)
}

fn shell(node: Option<String>) -> anyhow::Result<i32> {
    run(&find(node)?, vec!["bash".into()])
}

/// Runs a command with this process's own stdio.
fn run(entrance: &Entrance, words: Vec<OsString>) -> anyhow::Result<i32> {
    Ok(node::NodeCommand::new(entrance.clone(), words).run_here()?)
}

fn virtual_machine(verb: VmVerb) -> anyhow::Result<i32> {
    match verb {
        VmVerb::Run { kernel, memory, timeout, systemd, words } => {
            let timeout = Duration::from_secs(timeout);
            let options = VmOptions { kernel, memory_mib: memory, timeout, systemd, ..VmOptions::default() };
            let command = GuestCommand { title: None, argv: words, env: told() };
            let ended = vm::run(&options, &[command], std::io::stdout())?;
            Ok(ended.last().map_or(0, |ended| ended.code))
        }
        VmVerb::Test { list, kernel, memory, timeout } => {
            let mut plans = vm::plans(&list)?;
            plans.retain(|plan| kernel.as_ref().is_none_or(|kernel| *kernel == plan.kernel));
            anyhow::ensure!(!plans.is_empty(), "{} has no machine with that kernel", list.display());
            for command in plans.iter_mut().flat_map(|plan| &mut plan.commands) {
                // What the list says counts for more.
                command.env.splice(0..0, told());
            }
            let timeout = Duration::from_secs(timeout);
            let options = VmOptions { memory_mib: memory, timeout, ..VmOptions::default() };
            Ok(i32::from(!vm::test(&plans, &options)))
        }
        VmVerb::Setup { kernels } => {
            kernels.iter().try_for_each(|kernel| vm::prepare(kernel))?;
            Ok(0)
        }
        VmVerb::Init => vm::init().map(|()| 0).map_err(Into::into),
    }
}

/// What a test run is told by variables goes on into the machine.
fn told() -> Vec<(String, String)> {
    let prefixes = ["RUST_", "AGENTCUBE_MODEL_"];
    std::env::vars().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix))).collect()
}

fn find(node: Option<String>) -> anyhow::Result<Entrance> {
    let mut running = Entrance::all();
    if let Some(name) = node {
        return running
            .into_iter()
            .find(|entrance| entrance.name == name)
            .ok_or_else(|| NodeError::Unknown(name).into());
    }
    anyhow::ensure!(
        running.len() < 2,
        "several nodes are running, name one of them: {}",
        running.iter().map(|entrance| entrance.name.as_str()).collect::<Vec<_>>().join(", ")
    );
    running.pop().ok_or_else(|| NodeError::Unknown("at all".into()).into())
}

fn build() -> anyhow::Result<i32> {
    println!("{}", rootfs::ensure()?.display());
    for release in old_runc::RELEASES {
        // Only a test of compatibility needs these, and it tells when it is skipped.
        if let Err(why) = old_runc::ensure(release) {
            eprintln!("{why}");
        }
    }
    Ok(0)
}
