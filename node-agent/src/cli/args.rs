//! What can be typed after `agentcube`.

use std::{path::PathBuf, time::Duration};

use agentcube_control::{Depth, Timeouts, socket};
use clap::{Parser, Subcommand, ValueEnum, builder::NonEmptyStringValueParser};

/// Puts idle agent containers to sleep and wakes them.
#[derive(Debug, Parser)]
#[command(name = "agentcube", version, after_help = EXIT_CODES)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Only look at this namespace of containerd's (Kubernetes uses k8s.io, ctr uses default)
    #[arg(short, long, global = true, value_name = "NAMESPACE", value_parser = NonEmptyStringValueParser::new())]
    pub namespace: Option<String>,

    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,

    /// Where the shims' control sockets live
    #[arg(long, global = true, value_name = "DIR", env = "AGENTCUBE_SOCKET_ROOT", default_value = socket::DEFAULT_ROOT)]
    pub socket_root: PathBuf,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 something failed, 2 wrong usage, 3 no such container.
Control sockets are for root: run this as root.";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the containers of this node's agentcube shims
    Ps,
    /// Put containers to sleep: their memory is given back, their pods stay Running
    Sleep {
        /// Containers or sandboxes, by id or the start of one
        #[arg(required = true, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        ids: Vec<String>,

        /// How deep; without it, as deep as possible
        #[arg(long, value_enum)]
        depth: Option<DepthArg>,

        /// Where that depth does not work, sleep at the next shallower one that does, and say why
        #[arg(long)]
        or_shallower: bool,

        /// How long to wait
        #[command(flatten)]
        patience: Patience,
    },
    /// Wake containers
    Wake {
        /// Containers or sandboxes, by id or the start of one
        #[arg(required = true, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        ids: Vec<String>,

        /// How long to wait
        #[command(flatten)]
        patience: Patience,
    },
    /// Tell how deep running containers could sleep now, and why no deeper; does not disturb them
    Why {
        /// Containers, by id or the start of one
        #[arg(required = true, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        ids: Vec<String>,
    },
    /// Tell which commands are exec probes, and what each last came to. While a container sleeps its shim answers a
    /// probe that last succeeded (option probes = "answer"), rather than wake it
    Probes {
        /// A container, by id or the start of one
        #[arg(value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        id: String,

        /// A probe's command with its arguments, as `["cat", "/tmp/healthy"]`; those given are all there are
        #[arg(long = "command", value_name = "JSON", value_parser = command)]
        commands: Vec<ProbeCommand>,

        /// From now on there are none
        #[arg(long, conflicts_with = "commands")]
        none: bool,
    },
    /// Tell all about containers
    Inspect {
        /// Containers, by id or the start of one
        #[arg(required = true, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        ids: Vec<String>,
    },
}

/// A probe's command with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeCommand(pub Vec<String>);

fn command(text: &str) -> Result<ProbeCommand, serde_json::Error> {
    serde_json::from_str(text).map(ProbeCommand)
}

/// How long to wait for a sleep or a wake.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Patience {
    /// Stop waiting after so many seconds; the shim goes on
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
}

impl Patience {
    /// As the client wants it.
    pub fn timeouts(self) -> Timeouts {
        Timeouts { transition: Duration::from_secs(self.timeout.into()), ..Timeouts::default() }
    }
}

/// How deep an agent shall sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DepthArg {
    /// Uses no CPU; keeps its memory and its connections
    Frozen,
    /// Frozen, its memory pushed to swap
    Reclaimed,
    /// Written to disk, its processes gone
    Checkpointed,
}

impl DepthArg {
    /// As the request carries it; without one, as deep as the shim offers.
    pub fn wanted(depth: Option<DepthArg>) -> Depth {
        match depth {
            None => Depth::DEPTH_UNSPECIFIED,
            Some(DepthArg::Frozen) => Depth::DEPTH_FROZEN,
            Some(DepthArg::Reclaimed) => Depth::DEPTH_RECLAIMED,
            Some(DepthArg::Checkpointed) => Depth::DEPTH_CHECKPOINTED,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn global_options_stand_before_or_after_the_verb() {
        for line in [
            ["agentcube", "--json", "-n", "k8s.io", "sleep", "a", "b", "--depth", "frozen"],
            ["agentcube", "sleep", "a", "b", "--depth", "frozen", "--json", "-n", "k8s.io"],
        ] {
            let args = Args::try_parse_from(line).unwrap();
            assert!(args.json);
            assert_eq!(args.namespace.as_deref(), Some("k8s.io"));
            let Command::Sleep { ids, depth, patience, .. } = args.command else {
                panic!("not a sleep");
            };
            assert_eq!((ids, depth), (vec!["a".to_owned(), "b".to_owned()], Some(DepthArg::Frozen)));
            assert_eq!(patience.timeouts().transition, Duration::from_mins(2));
        }
    }

    #[test]
    fn commands_of_probes_are_argument_vectors() {
        let words =
            ["agentcube", "probes", "a", "--command", r#"["cat", "/tmp/a b"]"#, "--command", "[\"true\"]"];
        let Command::Probes { id, commands, none } = Args::try_parse_from(words).unwrap().command else {
            panic!("not of probes");
        };
        let command = |words: &[&str]| ProbeCommand(words.iter().map(ToString::to_string).collect());
        assert_eq!((id.as_str(), none), ("a", false));
        assert_eq!(commands, [command(&["cat", "/tmp/a b"]), command(&["true"])]);
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            &["agentcube"][..],
            &["agentcube", "sleep"],
            &["agentcube", "sleep", ""],
            &["agentcube", "sleep", "a", "--depth", "archived"],
            &["agentcube", "wake", "a", "--timeout", "0"],
            &["agentcube", "ps", "a"],
            &["agentcube", "probes"],
            &["agentcube", "probes", "a", "--command", "true"],
            &["agentcube", "probes", "a", "--command", "[\"true\"]", "--none"],
            &["agentcube", "ps", "-n", ""],
        ] {
            assert_eq!(Args::try_parse_from(line).unwrap_err().exit_code(), 2, "{line:?}");
        }
    }
}
