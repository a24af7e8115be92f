//! An OCI runtime's own checkpoint and restore, as somebody would use it who has nothing else.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use agentcube_tests::node::Runtime;
use anyhow::{Context as _, Result};
use serde_json::Value;

use super::agent::{self, Place};
use super::command::{self, last_lines};
use super::sleeper::{Sleeper, Slept};
use crate::plan::Workload;

/// Where images go: the file system of the shim's own images.
const IMAGES: &str = "/var/lib/agentcube/bench";

/// An agent under an OCI runtime that is called as a command.
pub struct Oci {
    program: &'static str,
    place: Place,
    /// The bundle, made once, in memory; its root file system is an overlay as containerd's.
    bundle: String,
    image: String,
    /// Logs of the runtime and of CRIU, in memory.
    work: String,
}

impl Oci {
    /// Makes a bundle with the specification that containerd makes for the same agent, and runs it.
    pub fn start(program: &'static str, id: &str, workload: Workload) -> Result<Self> {
        let cgroup = format!("/bench/{id}");
        let place = Place::prepare(id, workload, &cgroup)?;
        let [bundle, work] = ["bundles", "work"].map(|name| format!("{}/{name}/{id}", super::SCRATCH));
        for folder in [&format!("{bundle}/rootfs"), &work] {
            fs::create_dir_all(folder).with_context(|| format!("making {folder}"))?;
        }
        let image = agent::spec(workload, id, Runtime::Runc).image.reference();
        command::output(&["ctr", "images", "mount", "--rw", image, &format!("{bundle}/rootfs")])?;
        let config = format!("{bundle}/config.json");
        fs::write(&config, specification(id, workload, &cgroup)?)
            .with_context(|| format!("writing {config}"))?;
        let oci = Self { program, place, bundle, image: format!("{IMAGES}/{id}"), work };
        oci.call(&["run", "--detach"], &[&format!("--bundle={}", oci.bundle)])?;
        Ok(oci)
    }

    /// Runs a command of the runtime on this container. Its stdio is `/dev/null`: a container that has a file from
    /// outside as its output can't be checkpointed.
    fn call(&self, verb: &[&str], flags: &[&str]) -> Result<()> {
        let log = format!("{}/{}.log", self.work, self.program);
        let log_flag = format!("--log={log}");
        let words = [self.program, &log_flag].into_iter().chain(verb.iter().copied());
        let words = words.chain(flags.iter().copied()).chain([self.place.id.as_str()]);
        let words: Vec<String> = words.map(str::to_owned).collect();
        command::run_mute(&words).with_context(|| self.complaints(&log))
    }

    /// What the runtime and CRIU have logged about a failure.
    fn complaints(&self, log: &str) -> String {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut said = last_lines(&read(log), 2);
        for name in ["dump.log", "restore.log"] {
            let log = read(&format!("{}/{name}", self.work));
            let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
            if !errors.is_empty() {
                said = format!("{said}; {name}: {}", last_lines(&errors.join("\n"), 3));
            }
        }
        said
    }

    fn paths(&self) -> [String; 3] {
        // With its default crun has CRIU restore a cpuset of cgroup v1 where the host still has one, which fails.
        let mode = if self.program == "crun" { "ignore" } else { "soft" };
        [
            format!("--image-path={}", self.image),
            format!("--work-path={}", self.work),
            format!("--manage-cgroups-mode={mode}"),
        ]
    }
}

/// The OCI specification of an agent, as containerd makes it, for a container that `runc` or `crun` runs alone.
fn specification(id: &str, workload: Workload, cgroup: &str) -> Result<String> {
    let template = format!("{id}-template");
    let line = agent::spec(workload, id, Runtime::Runc).command_line(false, true);
    let words = create_words(&line, id, &template);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    command::output(&words)?;
    let text = command::output(&["ctr", "container", "info", "--spec", &template])?;
    command::output(&["ctr", "container", "delete", &template])?;
    let mut spec: Value = serde_json::from_str(&text).context("the specification that ctr prints")?;
    spec["linux"]["cgroupsPath"] = Value::from(cgroup);
    spec["root"]["path"] = Value::from("rootfs");
    serde_json::to_string(&spec).context("a specification")
}

/// A command line of `ctr run` as one of `ctr container create`, for a container `to` that never runs. That command takes
/// the flags of the other but those for resources.
fn create_words(run: &[String], from: &str, to: &str) -> Vec<String> {
    let mut words = Vec::new();
    for word in run.iter().filter(|word| !word.starts_with("--cpu-shares")) {
        match word.as_str() {
            "run" => words.extend(["container".to_owned(), "create".to_owned()]),
            word if word == from => words.push(to.to_owned()),
            word => words.push(word.to_owned()),
        }
    }
    words
}

impl Sleeper for Oci {
    fn place(&self) -> &Place {
        &self.place
    }

    fn sleep(&mut self) -> Result<Slept> {
        fs::create_dir_all(&self.image).with_context(|| format!("making {}", self.image))?;
        let [image, work, cgroups] = self.paths();
        let start = Instant::now();
        self.call(&["checkpoint"], &[&image, &work, &cgroups])?;
        Ok(Slept::by_command(start))
    }

    fn image(&mut self) -> Result<PathBuf> {
        Ok(PathBuf::from(&self.image))
    }

    fn traces(&mut self) -> Result<PathBuf> {
        Ok(PathBuf::from(&self.work))
    }

    fn wake(&mut self) -> Result<()> {
        let [image, work, cgroups] = self.paths();
        self.call(&["restore", "--detach"], &[&format!("--bundle={}", self.bundle), &image, &work, &cgroups])
    }

    fn tidy(&mut self) -> Result<()> {
        fs::remove_dir_all(&self.image).with_context(|| format!("removing {}", self.image))
    }

    fn delete(&mut self) -> Result<()> {
        self.call(&["delete", "--force"], &[])?;
        let _ = fs::remove_dir_all(&self.image);
        command::output(&["ctr", "images", "unmount", "--rm", &format!("{}/rootfs", self.bundle)])?;
        self.place.remove()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_becomes_a_create_of_another_name_without_resources() {
        let line = agent::spec(Workload::Python(16), "runc-1", Runtime::Runc).command_line(false, true);
        let words = create_words(&line, "runc-1", "t").join(" ");
        assert!(
            words.starts_with("ctr --namespace default container create --runtime io.containerd.runc.v2")
        );
        assert!(words.ends_with("localhost/python-agent:1 t") && !words.contains("cpu-shares"), "{words}");
        assert!(words.contains("network:/run/netns/runc-1"), "{words}");
    }
}
