//! A runtime that records what it is asked to do, and ends its work when the test says so.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxResources;
use tokio::sync::{Notify, oneshot};

use crate::lifecycle::Depth;
use crate::probe_commands::{Commands, Said};
use crate::runtime::{
    CheckpointConfig, CreateConfig, DumpReport, ExecConfig, Process, ProcessExit, Reason, Reasons,
    ReclaimReport, Restored, Runtime, RuntimeError, RuntimeFactory, Veto,
};
use crate::wake::{Demand, WakeCause};

/// The pid of the first init process; each further process has the next one.
pub const FIRST_PID: u32 = 1000;

/// The pid of execs that are only answered for.
pub const ANSWERER: u32 = 77;

#[derive(Default)]
struct Inner {
    calls: Vec<String>,
    /// Ends of processes that live, by pid.
    living: HashMap<u32, oneshot::Sender<ProcessExit>>,
    next_pid: u32,
    init: u32,
    execs: HashMap<String, u32>,
    failures: VecDeque<(&'static str, RuntimeError)>,
    hold: Option<&'static str>,
    probes: Option<Commands>,
}

/// The runtime, its factory, and the test's hand on both.
#[derive(Clone, Default)]
pub struct Fake {
    inner: Arc<Mutex<Inner>>,
    released: Arc<Notify>,
    input: Arc<Notify>,
    probe: Arc<Notify>,
}

impl Fake {
    /// What was asked so far; empties the record.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.inner.lock().unwrap().calls)
    }

    /// Lets the next call of `what` fail.
    pub fn fail_next(&self, what: &'static str, error: RuntimeError) {
        self.inner.lock().unwrap().failures.push_back((what, error));
    }

    /// Lets the next call of `what` take until [`Self::release`].
    pub fn hold(&self, what: &'static str) {
        self.inner.lock().unwrap().hold = Some(what);
    }

    /// Lets the held call go on.
    pub fn release(&self) {
        self.released.notify_one();
    }

    /// Exec probes with these commands are answered for containers that are created from now on.
    pub fn answers(&self, commands: &[&[&str]]) {
        let words = |words: &&[&str]| words.iter().map(ToString::to_string).collect();
        let commands: Vec<Vec<String>> = commands.iter().map(words).collect();
        self.inner.lock().unwrap().probes = Some(Commands::try_from(commands).unwrap());
    }

    /// Bytes for the standard input arrive.
    pub fn input_arrives(&self) {
        self.input.notify_one();
    }

    /// A probe arrives, and nothing else.
    pub fn probe_arrives(&self) {
        self.probe.notify_one();
    }

    /// The process ends with `code`.
    pub fn exit(&self, pid: u32, code: u32) {
        let end = self.inner.lock().unwrap().living.remove(&pid).expect("the process lives");
        let _ = end.send(ProcessExit { code, at: SystemTime::now() });
    }

    /// Pid of the current init process.
    pub fn init(&self) -> u32 {
        self.inner.lock().unwrap().init
    }

    fn record(&self, call: impl Into<String>) {
        self.inner.lock().unwrap().calls.push(call.into());
    }

    async fn work(&self, what: &'static str, call: String) -> Result<(), RuntimeError> {
        self.record(call);
        let held = {
            let mut inner = self.inner.lock().unwrap();
            inner.hold.take_if(|held| *held == what).is_some()
        };
        if held {
            self.released.notified().await;
        }
        self.outcome(what)
    }

    fn outcome(&self, what: &'static str) -> Result<(), RuntimeError> {
        let mut inner = self.inner.lock().unwrap();
        match inner.failures.front() {
            Some((of, _)) if *of == what => Err(inner.failures.pop_front().unwrap().1),
            _ => Ok(()),
        }
    }

    fn begin(&self, exec_id: Option<&str>) -> Process {
        let mut inner = self.inner.lock().unwrap();
        let pid = FIRST_PID + inner.next_pid;
        inner.next_pid += 1;
        let (end, exit) = oneshot::channel();
        inner.living.insert(pid, end);
        match exec_id {
            None => inner.init = pid,
            Some(id) => drop(inner.execs.insert(id.to_owned(), pid)),
        }
        Process { pid, exit: Box::pin(async move { exit.await.expect("the fake outlives its processes") }) }
    }
}

#[async_trait]
impl RuntimeFactory for Fake {
    async fn create(&self, config: &CreateConfig) -> Result<(Arc<dyn Runtime>, Process), RuntimeError> {
        let CreateConfig { id, namespace, bundle, stdio, checkpoint, .. } = config;
        let call = format!(
            "create {namespace}/{id} bundle={} terminal={} stdout={} checkpoint={checkpoint:?}",
            bundle.display(),
            stdio.terminal,
            stdio.stdout
        );
        self.work("create", call).await?;
        Ok((Arc::new(self.clone()), self.begin(None)))
    }
}

#[async_trait]
impl Runtime for Fake {
    async fn start(&self) -> Result<Option<Process>, RuntimeError> {
        self.work("start", "start".to_owned()).await?;
        Ok(None)
    }

    async fn exec(&self, config: &ExecConfig) -> Result<Process, RuntimeError> {
        let spec = String::from_utf8_lossy(&config.spec);
        if let Some(taps) = &config.taps {
            taps.stdout.note(b"fine");
        }
        self.work("exec", format!("exec {} {spec} stdin={}", config.exec_id, config.stdio.stdin)).await?;
        Ok(self.begin(Some(&config.exec_id)))
    }

    async fn answer_exec(&self, config: &ExecConfig, said: Said) -> Result<Process, RuntimeError> {
        let said_text = String::from_utf8_lossy(&said.stdout).into_owned();
        self.work("answer exec", format!("answer exec {} {said_text}", config.exec_id)).await?;
        Ok(Process { pid: ANSWERER, exit: Box::pin(std::future::ready(said.exit)) })
    }

    fn probe_commands(&self) -> Option<Commands> {
        self.inner.lock().unwrap().probes.clone()
    }

    fn signal(&self, exec_id: Option<&str>, signal: u32, all: bool) -> Result<(), RuntimeError> {
        self.record(format!("signal {signal} to {} all={all}", exec_id.unwrap_or("init")));
        self.outcome("signal")?;
        if signal == 9 {
            let pid = {
                let inner = self.inner.lock().unwrap();
                exec_id.map_or(Some(inner.init), |id| inner.execs.get(id).copied())
            };
            let lives = |pid: &u32| self.inner.lock().unwrap().living.contains_key(pid);
            if let Some(pid) = pid.filter(lives) {
                self.exit(pid, 137);
            }
        }
        Ok(())
    }

    fn resize(&self, exec_id: Option<&str>, width: u16, height: u16) -> Result<(), RuntimeError> {
        self.record(format!("resize {} to {width}x{height}", exec_id.unwrap_or("init")));
        self.outcome("resize")
    }

    fn close_stdin(&self, exec_id: Option<&str>) -> Result<(), RuntimeError> {
        self.record(format!("close stdin of {}", exec_id.unwrap_or("init")));
        Ok(())
    }

    async fn update(&self, resources: &LinuxResources, asleep: bool) -> Result<(), RuntimeError> {
        let shares = resources.cpu().as_ref().and_then(oci_spec::runtime::LinuxCpu::shares);
        self.work("update", format!("update shares={shares:?} asleep={asleep}")).await
    }

    async fn freeze(&self) -> Result<(), RuntimeError> {
        self.work("freeze", "freeze".to_owned()).await
    }

    async fn watch(&self) -> Result<(), RuntimeError> {
        self.outcome("watch")
    }

    fn unwatch(&self) {}

    fn can_reclaim(&self) -> Result<(), RuntimeError> {
        self.outcome("can reclaim")
    }

    async fn reclaim(&self, veto: Veto) -> Result<ReclaimReport, RuntimeError> {
        self.work("reclaim", "reclaim".to_owned()).await?;
        if veto.is_raised() {
            return Err(RuntimeError::Vetoed);
        }
        Ok(ReclaimReport { before: 4096, after: 1024, engine: "memory.reclaim", rest_because: None })
    }

    async fn thaw(&self) -> Result<(), RuntimeError> {
        self.work("thaw", "thaw".to_owned()).await
    }

    async fn dump(&self, veto: Veto) -> Result<DumpReport, RuntimeError> {
        self.work("dump", "dump".to_owned()).await?;
        if veto.is_raised() {
            return Err(RuntimeError::Vetoed);
        }
        let init = self.init();
        if !self.inner.lock().unwrap().living.contains_key(&init) {
            return Err(RuntimeError::Failed("the process is gone".to_owned()));
        }
        self.exit(init, 137);
        Ok(DumpReport {
            stopped: Duration::from_millis(7),
            image_bytes: 4096,
            image_dir: PathBuf::from("/images/1"),
            engine: "direct",
            mode: "pod-namespaces",
            classic_because: None,
            whole_because: None,
            memory_bytes: 2048,
        })
    }

    async fn restore(&self) -> Result<Restored, RuntimeError> {
        self.work("restore", "restore".to_owned()).await?;
        Ok(Restored { process: self.begin(None), engine: "direct", mode: "pod-namespaces" })
    }

    async fn memory_lost(&self) -> Option<String> {
        let failed = self.outcome("fill").err()?;
        self.exit(self.init(), 137);
        Some(failed.to_string())
    }

    async fn checkpoint(&self, config: &CheckpointConfig) -> Result<(), RuntimeError> {
        let call = format!("checkpoint {} exit={}", config.image_path.display(), config.exit);
        self.work("checkpoint", call).await
    }

    fn drop_image(&self) {
        self.record("drop image");
    }

    fn kill_rest(&self) {
        self.record("kill rest");
    }

    async fn delete_exec(&self, exec_id: &str) -> Result<(), RuntimeError> {
        self.work("delete exec", format!("delete exec {exec_id}")).await
    }

    async fn delete(&self) -> Result<(), RuntimeError> {
        self.work("delete", "delete".to_owned()).await
    }

    async fn demand(&self) -> Demand {
        tokio::select! {
            () = self.input.notified() => Demand::Wake(WakeCause::Input),
            () = self.probe.notified() => Demand::Probe,
        }
    }

    async fn thaw_for_probe(&self) -> Result<(), RuntimeError> {
        self.work("thaw for probe", "thaw for probe".to_owned()).await
    }

    async fn probe_over(&self) -> bool {
        self.work("probe over", "probe over".to_owned()).await.is_ok()
    }

    async fn refreeze(&self) -> Result<(), RuntimeError> {
        self.work("refreeze", "refreeze".to_owned()).await
    }

    async fn why(&self) -> Result<Reasons, RuntimeError> {
        Ok(Reasons {
            deepest: Depth::Frozen,
            reasons: vec![Reason { kind: "debugger".to_owned(), text: "a debugger is attached".to_owned() }],
            doubts: Vec::new(),
            closing: 2,
            next_timer: Some(Duration::from_millis(1500)),
        })
    }

    fn pids(&self) -> Vec<u32> {
        self.inner.lock().unwrap().living.keys().copied().collect()
    }

    fn stats(&self) -> Result<Any, RuntimeError> {
        Ok(Any {
            type_url: "io.containerd.cgroups.v2.Metrics".to_owned(),
            value: vec![1],
            ..Default::default()
        })
    }

    fn memory(&self) -> (u64, &'static str) {
        (1, "memory.current")
    }
}
