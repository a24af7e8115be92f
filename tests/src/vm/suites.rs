//! Which tests run in which virtual machine: a list in TOML, and the binaries that cargo builds of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::error::{Result, VmError};
use super::guest::GuestCommand;

/// One machine: what boots, and what runs there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachinePlan {
    /// What its output is marked with.
    pub name: String,
    /// The release of Debian whose kernel boots.
    pub kernel: String,
    /// systemd is its first process.
    pub systemd: bool,
    /// The suites, one after another.
    pub commands: Vec<GuestCommand>,
}

/// The list as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    machine: Vec<Machine>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Machine {
    name: String,
    kernel: String,
    #[serde(default)]
    systemd: bool,
    suites: Vec<String>,
}

/// Reads a list of machines and suites, and has cargo build the test binaries. Of several binaries of one name the one
/// that cargo tells of last counts.
///
/// # Errors
/// When the list is not understood, names a suite that does not exist, or cargo fails.
pub fn plans(path: &Path) -> Result<Vec<MachinePlan>> {
    let wrong = |why: String| VmError::Suites { path: path.into(), why };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    parse(&text, &binaries()?).map_err(wrong)
}

fn parse(text: &str, binaries: &BTreeMap<String, String>) -> std::result::Result<Vec<MachinePlan>, String> {
    let list: List = toml::from_str(text).map_err(|error| error.to_string())?;
    let plan = |machine: Machine| {
        let commands = machine
            .suites
            .iter()
            .map(|suite| command(suite, binaries))
            .collect::<std::result::Result<_, _>>()?;
        Ok(MachinePlan { name: machine.name, kernel: machine.kernel, systemd: machine.systemd, commands })
    };
    list.machine.into_iter().map(plan).collect()
}

/// A suite is written as a command line: variables, the name of the test binary, arguments.
fn command(suite: &str, binaries: &BTreeMap<String, String>) -> std::result::Result<GuestCommand, String> {
    let mut words = suite.split_whitespace().peekable();
    let mut env = Vec::new();
    while let Some((name, value)) = words.peek().and_then(|word| word.split_once('=')) {
        env.push((name.to_owned(), value.to_owned()));
        words.next();
    }
    let name = words.next().ok_or_else(|| format!("{suite:?} names no suite"))?;
    let binary = binaries.get(name).ok_or_else(|| format!("there is no suite {name:?}"))?;
    let argv = std::iter::once(binary.clone()).chain(words.map(str::to_owned)).collect();
    Ok(GuestCommand { title: Some(suite.to_owned()), argv, env })
}

/// The integration tests of the workspace, by name. With the same choice of packages as in the Makefile, which has them
/// built already.
fn binaries() -> Result<BTreeMap<String, String>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--workspace", "--locked", "--no-run", "--message-format=json"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| VmError::Cargo(error.to_string()))?;
    if !output.status.success() {
        return Err(VmError::Cargo(output.status.to_string()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(test_binary).collect())
}

/// The name and the path of an integration test in one of cargo's messages.
fn test_binary(message: &str) -> Option<(String, String)> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let target = &message["target"];
    if message["reason"] != "compiler-artifact" || target["kind"][0] != "test" {
        return None;
    }
    Some((target["name"].as_str()?.to_owned(), message["executable"].as_str()?.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn binaries() -> BTreeMap<String, String> {
        [("limits".to_owned(), "/target/debug/deps/limits-1".to_owned())].into()
    }

    #[test]
    fn a_suite_is_variables_a_name_and_arguments() {
        let suite = command("A=1 B=2 limits wake --nocapture", &binaries()).unwrap();
        assert_eq!(suite.argv, ["/target/debug/deps/limits-1", "wake", "--nocapture"]);
        assert_eq!(suite.env, [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())]);
        assert!(command("A=1", &binaries()).unwrap_err().contains("names no suite"));
        assert!(command("limit", &binaries()).unwrap_err().contains("\"limit\""));
    }

    #[test]
    fn a_list_is_read_strictly() {
        let text = "[[machine]]\nname = \"a\"\nkernel = \"forky\"\nsuites = [\"limits\"]\n";
        let plans = parse(text, &binaries()).unwrap();
        assert_eq!((plans[0].name.as_str(), plans[0].kernel.as_str()), ("a", "forky"));
        assert_eq!(plans[0].commands.len(), 1);
        assert!(parse(&text.replace("kernel", "colonel"), &binaries()).is_err());
    }

    #[test]
    fn only_integration_tests_are_taken_from_what_cargo_says() {
        let message = |kind: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"name":"limits","kind":["{kind}"]}},"executable":"/x"}}"#
            )
        };
        assert_eq!(test_binary(&message("test")), Some(("limits".into(), "/x".into())));
        for other in [message("lib"), "{}".to_owned(), "no message".to_owned()] {
            assert_eq!(test_binary(&other), None);
        }
    }
}
