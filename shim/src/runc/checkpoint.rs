//! `runc checkpoint` and `runc restore`: for clients' checkpoints, and as the engine of sleeps where runc's private
//! state is not as the direct engine knows it.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use criu_hooks::{
    criu::log,
    image::{Facts, Image, ImageWriter, Versions},
    procfs,
    spawn::Spawner,
};
use rustix::process::Pid;
use tracing::warn;

use super::{
    RuncContainer, create, failed, precondition,
    process::{self, ProcessHandle},
    sleep::{Objections, Woken},
};
use crate::{
    io::{ConsoleSocket, Inherit},
    runtime::{CheckpointConfig, RuntimeError},
};

/// The words after runc's global ones for a checkpoint.
fn checkpoint_args(id: &str, config: &CheckpointConfig) -> Vec<OsString> {
    let mut args: Vec<OsString> =
        vec!["checkpoint".into(), "--image-path".into(), config.image_path.clone().into()];
    if let Some(work) = &config.work_path {
        args.extend(["--work-path".into(), work.clone().into()]);
    }
    for (set, flag) in [
        (!config.exit, "--leave-running"),
        (config.open_tcp, "--tcp-established"),
        (config.external_unix_sockets, "--ext-unix-sk"),
        (config.terminal, "--shell-job"),
        (config.file_locks, "--file-locks"),
    ] {
        if set {
            args.push(flag.into());
        }
    }
    args.push(id.into());
    args
}

/// The words after runc's global ones for a restore.
fn restore_args(
    id: &str,
    bundle: &Path,
    image: &Path,
    work: &Path,
    pid_file: &Path,
    console: Option<&Path>,
) -> Vec<OsString> {
    let mut args: Vec<OsString> =
        ["restore", "--detach", "--no-subreaper", "--file-locks"].map(Into::into).into();
    for (flag, path) in
        [("--bundle", bundle), ("--image-path", image), ("--work-path", work), ("--pid-file", pid_file)]
    {
        args.extend([flag.into(), path.into()]);
    }
    if let Some(console) = console {
        args.extend(["--console-socket".into(), console.into()]);
    }
    args.push(id.into());
    args
}

/// The PATH by which runc finds the CRIU of the options: its directory first, if it has one.
fn path_with(criu: &Path) -> Option<OsString> {
    let directory = criu.parent().filter(|parent| parent.is_absolute())?;
    let old = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(directory.to_owned()).chain(std::env::split_paths(&old))).ok()
}

impl RuncContainer {
    /// runc with its global words and `args`.
    fn runc_command(&self, args: Vec<OsString>) -> Command {
        let mut command = Command::new(&self.options.runc_binary);
        command
            .arg("--root")
            .arg(self.options.runc_root.join(&self.namespace))
            .arg("--log")
            .arg(self.runc_log())
            .args(["--log-format", "json"])
            .args(self.options.systemd_cgroup.then_some("--systemd-cgroup"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(path) = path_with(&self.options.criu_binary) {
            command.env("PATH", path);
        }
        command
    }

    /// Runs runc; `work` is where its CRIU logs to `criu_log`.
    async fn run_runc(
        &self,
        what: &'static str,
        command: Command,
        work: &Path,
        criu_log: &str,
    ) -> Result<(), RuntimeError> {
        let child = self.reaper.spawn(command).map_err(failed)?;
        let exit = child.exit.await.map_err(failed)?;
        if exit.success() {
            return Ok(());
        }
        let said = process::last_error(&self.runc_log()).unwrap_or_else(|| exit.to_string());
        let reason =
            fs::File::open(work).ok().and_then(|work| log::read_reason(&work, criu_log).ok().flatten());
        let reason = reason.map(|reason| format!("; CRIU: {reason}")).unwrap_or_default();
        Err(precondition(format!("runc {what}: {said}{reason}")))
    }

    /// Makes an image that `runc restore` and containerd take, and lets the agent go on.
    pub(super) async fn checkpoint_for_client(&self, config: &CheckpointConfig) -> Result<(), RuntimeError> {
        private_directory(&config.image_path).map_err(|error| {
            precondition(format!("cannot make the directory {}: {error}", config.image_path.display()))
        })?;
        self.complete_fill().await?;
        let work = config.work_path.clone().unwrap_or_else(|| config.image_path.clone());
        let command = self.runc_command(checkpoint_args(&self.id, config));
        self.run_runc("checkpoint", command, &work, "dump.log").await
    }

    /// Dumps the frozen container with runc and ends its processes. They stay frozen until they end, so nothing happens
    /// between the image and the end.
    pub(super) async fn dump_with_runc(
        &self,
        init: Pid,
        spec_digest: String,
        writer: &ImageWriter,
        objections: &Objections,
    ) -> Result<Image, RuntimeError> {
        let stdio = procfs::stdio_keys(init).map_err(failed)?;
        let frozen = std::time::Instant::now();
        let config = CheckpointConfig {
            image_path: writer.path().join(criu_hooks::image::IMAGES),
            work_path: Some(writer.path().join(criu_hooks::image::WORK)),
            file_locks: true,
            ..CheckpointConfig::default()
        };
        let work = config.work_path.clone().unwrap_or_default();
        let command = self.runc_command(checkpoint_args(&self.id, &config));
        self.run_runc("checkpoint", command, &work, "dump.log").await?;
        let facts = Facts {
            spec_digest,
            init_pid: init.as_raw_nonzero().get(),
            cgroup: self.cgroup.path().to_string_lossy().into_owned(),
            stdio,
            stopped_us: u64::try_from(frozen.elapsed().as_micros()).unwrap_or(u64::MAX),
            versions: Versions { runc: "checkpoint".to_owned(), ..Versions::default() },
            ..Facts::default()
        };
        writer.complete_in_background(facts).await.map_err(failed)?;
        let image = match self.kill_dumped(writer, objections) {
            Ok(image) => image,
            Err(error) => {
                writer.revoke().map_err(failed)?;
                return Err(error);
            }
        };
        // From here on the image is the agent: what is not as it should be is no failure of the sleep.
        let emptied = self.cgroup.wait_unpopulated(super::FREEZE).await;
        if let Err(error) = emptied.and(self.cgroup.thaw().await) {
            warn!(id = %self.id, %error, "the cgroup is not as it should be after a dump");
        }
        Ok(image)
    }

    /// Kills what runc has dumped, unless something speaks against it.
    fn kill_dumped(&self, writer: &ImageWriter, objections: &Objections) -> Result<Image, RuntimeError> {
        let image = writer.open().map_err(failed)?;
        if objections.raised().is_some() {
            return Err(RuntimeError::Vetoed);
        }
        // runc hands a frozen cgroup back frozen; whoever thawed it meanwhile let the agent run on past its image.
        if !self.cgroup.is_frozen().map_err(failed)? {
            return Err(failed("runc thawed the container: the image is out of date and was discarded"));
        }
        self.cgroup.kill().map_err(failed)?;
        Ok(image)
    }

    /// Restores with runc, which makes the container anew. Returns the new init process, its exit, and its console.
    pub(super) async fn restore_with_runc(
        &self,
        image: &Arc<Image>,
        inherit: &[Inherit],
        terminal: bool,
    ) -> Result<Woken, RuntimeError> {
        // runc restores only what does not exist. Its record of the dead container is no loss: the image has all.
        if let Err(error) = self.runc.delete(&self.id, None).await {
            let error = process::runc_error("delete", error, &self.runc_log());
            if !error.to_string().contains("does not exist") {
                return Err(error);
            }
        }
        let console = if terminal { Some(ConsoleSocket::new().map_err(failed)?) } else { None };
        let pid_file = self.bundle.join(create::INIT_PID);
        let (images, work) =
            (image.path().join(criu_hooks::image::IMAGES), image.path().join(criu_hooks::image::WORK));
        let args = restore_args(
            &self.id,
            &self.bundle,
            &images,
            &work,
            &pid_file,
            console.as_ref().map(ConsoleSocket::path),
        );
        let mut command = self.runc_command(args);
        // runc lets its own streams stand in for the container's, in their order.
        for (index, key) in image.manifest().facts.stdio.iter().enumerate() {
            let end = inherit.iter().find(|end| Some(&end.key) == key.as_ref());
            let Some(end) = end else { continue };
            let end: Stdio = end.fd.try_clone().map_err(failed)?.into();
            match index {
                0 => command.stdin(end),
                1 => command.stdout(end),
                _ => command.stderr(end),
            };
        }
        let restored = async {
            let mark = self.reaper.mark();
            self.run_runc("restore", command, &work, "restore.log").await?;
            let pid = process::read_pid(&pid_file)?;
            let exit = self.reaper.claim(pid, mark);
            let init = ProcessHandle::open(pid);
            let console = match console {
                Some(socket) => Some(socket.receive().await.map_err(failed)?),
                None => None,
            };
            Ok(Woken { pid, init, exit, console })
        };
        let restored = restored.await;
        if restored.is_err() {
            // Nothing of a half-restored container may be left; the image stays.
            let killed = async {
                self.cgroup.kill()?;
                self.cgroup.wait_unpopulated(super::FREEZE).await
            };
            if let Err(error) = killed.await {
                warn!(id = %self.id, %error, "after a failed restore");
            }
        }
        restored
    }
}

fn private_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(args: &[OsString]) -> String {
        args.join(" ".as_ref()).to_string_lossy().into_owned()
    }

    #[test]
    fn a_checkpoint_leaves_the_container_running_unless_its_exit_is_asked_for() {
        let mut config = CheckpointConfig { image_path: "/i".into(), ..CheckpointConfig::default() };
        assert_eq!(text(&checkpoint_args("c", &config)), "checkpoint --image-path /i --leave-running c");
        config.exit = true;
        config.work_path = Some("/w".into());
        config.file_locks = true;
        config.open_tcp = true;
        let expected = "checkpoint --image-path /i --work-path /w --tcp-established --file-locks c";
        assert_eq!(text(&checkpoint_args("c", &config)), expected);
    }

    #[test]
    fn a_restore_is_detached_and_names_its_bundle() {
        let path = Path::new;
        let args = restore_args("c", path("/b"), path("/i"), path("/w"), path("/p"), Some(path("/s")));
        let expected = "restore --detach --no-subreaper --file-locks --bundle /b --image-path /i --work-path /w \
                        --pid-file /p --console-socket /s c";
        assert_eq!(text(&args), expected);
    }

    #[test]
    fn runc_finds_the_criu_of_the_options() {
        let path = path_with(Path::new("/opt/criu/bin/criu")).unwrap_or_default();
        assert!(path.to_string_lossy().starts_with("/opt/criu/bin:"), "{}", path.display());
        assert_eq!(path_with(Path::new("criu")), None);
    }
}
