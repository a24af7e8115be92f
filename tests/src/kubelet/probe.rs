//! Probes: what a kubelet asks of a container, when, and what it makes of the answers.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::error::{KubeletError, Result};
use super::grpc::{self, Call, Code};
use super::health::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};
use super::{Cri, transport};
use crate::node::Node;

/// By which servers know a kubelet's probes.
pub const USER_AGENT: &str = "kube-probe/1.36";

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// `GET` of this path at this port: any status from 200 to 399 is a success.
    Http(u16, String),
    /// Whether this port takes a connection, which is closed at once.
    Tcp(u16),
    /// The health service of gRPC at this port.
    Grpc(u16),
    /// A command in the container: the exit status 0 is a success.
    Exec(Vec<String>),
}

/// A probe with its timing; the defaults are those of Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What is asked.
    pub ask: Ask,
    /// How long after the start of the container for the first time.
    pub initial_delay: Duration,
    /// How often.
    pub period: Duration,
    /// How long the answer may take.
    pub timeout: Duration,
    /// How many failures in a row are believed.
    pub failures: u32,
    /// How many successes in a row are believed after a failure.
    pub successes: u32,
}

impl Probe {
    fn new(ask: Ask) -> Self {
        Self {
            ask,
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            failures: 3,
            successes: 1,
        }
    }

    /// A probe by HTTP.
    pub fn http(port: u16, path: &str) -> Self {
        Self::new(Ask::Http(port, path.to_owned()))
    }

    /// A probe by TCP.
    pub fn tcp(port: u16) -> Self {
        Self::new(Ask::Tcp(port))
    }

    /// A probe by gRPC.
    pub fn grpc(port: u16) -> Self {
        Self::new(Ask::Grpc(port))
    }

    /// A probe by a command.
    pub fn exec(command: &[&str]) -> Self {
        Self::new(Ask::Exec(command.iter().map(ToString::to_string).collect()))
    }

    /// Sets how often it is asked.
    #[must_use]
    pub fn every(mut self, period: Duration) -> Self {
        self.period = period;
        self
    }

    /// Sets how long the answer may take.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how many failures in a row are believed.
    #[must_use]
    pub fn failures(mut self, count: u32) -> Self {
        self.failures = count;
        self
    }
}

/// What a probe decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Whether the container is restarted.
    Liveness,
    /// Whether its pod is ready.
    Readiness,
    /// Whether the other probes are asked.
    Startup,
}

/// What is believed after the answers that have come.
#[derive(Debug, Clone)]
pub struct Judge {
    failures: u32,
    successes: u32,
    last: Option<bool>,
    row: u32,
    /// Nothing is known of a start that has not succeeded yet.
    belief: Option<bool>,
}

impl Judge {
    /// Before the first answer: alive, but not ready, and not known to have started.
    pub fn new(probe: &Probe, kind: Kind) -> Self {
        let belief = match kind {
            Kind::Liveness => Some(true),
            Kind::Readiness => Some(false),
            Kind::Startup => None,
        };
        Self { failures: probe.failures, successes: probe.successes, last: None, row: 0, belief }
    }

    /// Takes note of an answer; gives back what is believed now.
    pub fn note(&mut self, ok: bool) -> Option<bool> {
        self.row = if self.last == Some(ok) { self.row + 1 } else { 1 };
        self.last = Some(ok);
        if self.row >= if ok { self.successes } else { self.failures } {
            self.belief = Some(ok);
        }
        self.belief
    }
}

/// What all of a container's probes together have a kubelet believe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Belief {
    /// It needs no restart.
    pub alive: bool,
    /// It can serve.
    pub ready: bool,
    /// Its other probes may be asked.
    pub started: bool,
}

impl Belief {
    /// Before the first probe: what is not probed is taken for granted.
    pub fn fresh(has_startup: bool, has_readiness: bool) -> Self {
        Self { alive: true, ready: !has_readiness, started: !has_startup }
    }

    /// Takes over what one probe has come to; gives back whether that probe has nothing more to ask of this container.
    pub fn learn(&mut self, kind: Kind, believed: Option<bool>) -> bool {
        match (kind, believed) {
            (Kind::Readiness, Some(ready)) => self.ready = ready,
            (Kind::Startup, Some(true)) => self.started = true,
            (Kind::Startup | Kind::Liveness, Some(false)) => self.alive = false,
            (Kind::Liveness, Some(true)) | (_, None) => {}
        }
        match kind {
            Kind::Startup => self.started || !self.alive,
            Kind::Liveness => !self.alive,
            Kind::Readiness => false,
        }
    }
}

/// Asks once. The answer is a success, or why it is none; nothing when the runtime could not even ask, which a kubelet
/// does not count.
pub(super) fn ask(node: &Node, cri: &Cri, container: &str, ip: IpAddr, probe: &Probe) -> Option<Outcome> {
    let begun = Instant::now();
    let answer = match &probe.ask {
        Ask::Http(port, path) => http(node, SocketAddr::new(ip, *port), path, probe.timeout),
        Ask::Tcp(port) => node
            .connect(SocketAddr::new(ip, *port), probe.timeout)
            .map(drop)
            .map_err(|error| error.to_string()),
        Ask::Grpc(port) => health(node, SocketAddr::new(ip, *port), probe.timeout),
        Ask::Exec(command) => {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            match cri.exec_sync(container, &words, probe.timeout) {
                Ok(done) if done.exit_code == 0 => Ok(()),
                Ok(done) => Err(format!(
                    "status {}: {}{}",
                    done.exit_code,
                    String::from_utf8_lossy(&done.stdout),
                    String::from_utf8_lossy(&done.stderr)
                )),
                Err(error) if error.code() == Some(Code::DeadlineExceeded) => Err(error.to_string()),
                Err(_) => return None,
            }
        }
    };
    Some(Outcome { answer, took: begun.elapsed() })
}

/// An answer to a probe.
pub(super) struct Outcome {
    pub(super) answer: std::result::Result<(), String>,
    pub(super) took: Duration,
}

fn http(node: &Node, address: SocketAddr, path: &str, timeout: Duration) -> std::result::Result<(), String> {
    let mut stream = node.connect(address, timeout).map_err(|error| error.to_string())?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(|error| error.to_string())?;
    let head = String::from_utf8_lossy(&answer);
    match http_status(&head) {
        Some(200..400) => Ok(()),
        _ => Err(format!("the answer was {:?}", head.lines().next().unwrap_or_default())),
    }
}

fn http_status(head: &str) -> Option<u16> {
    head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()
}

fn health(node: &Node, address: SocketAddr, timeout: Duration) -> std::result::Result<(), String> {
    let serving = || -> Result<bool> {
        let stream = node.connect(address, timeout)?;
        let runtime = transport(tokio::runtime::Builder::new_current_thread().enable_all().build())?;
        transport(stream.set_nonblocking(true))?;
        let answer: HealthCheckResponse = runtime.block_on(async {
            let stream = transport(tokio::net::TcpStream::from_std(stream))?;
            let call = Call { path: "/grpc.health.v1.Health/Check", user_agent: USER_AGENT, timeout };
            grpc::unary(stream, call, &HealthCheckRequest::default()).await
        })?;
        Ok(answer.status.enum_value() == Ok(ServingStatus::SERVING))
    };
    match serving() {
        Ok(true) => Ok(()),
        Ok(false) => Err("it says that it does not serve".into()),
        Err(error @ (KubeletError::Status { .. } | KubeletError::Timeout { .. })) => Err(error.to_string()),
        Err(error) => Err(format!("{address}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_failures_are_not_believed() {
        let probe = Probe::tcp(1).failures(3);
        let mut judge = Judge::new(&probe, Kind::Liveness);
        for ok in [false, false, true, false, false] {
            assert_eq!(judge.note(ok), Some(true));
        }
        assert_eq!(judge.note(false), Some(false));
        assert_eq!(judge.note(true), Some(true));
    }

    #[test]
    fn readiness_begins_with_no_and_startup_with_nothing() {
        let mut probe = Probe::tcp(1);
        probe.successes = 2;
        let mut ready = Judge::new(&probe, Kind::Readiness);
        assert_eq!((ready.note(true), ready.note(true)), (Some(false), Some(true)));
        let mut started = Judge::new(&probe, Kind::Startup);
        assert_eq!((started.note(false), started.note(true), started.note(true)), (None, None, Some(true)));
    }

    #[test]
    fn a_probe_is_done_with_a_container_when_it_has_condemned_it_or_let_it_start() {
        let mut belief = Belief::fresh(true, true);
        assert_eq!(belief, Belief { alive: true, ready: false, started: false });
        assert!(!belief.learn(Kind::Startup, None));
        assert!(belief.learn(Kind::Startup, Some(true)) && belief.started);
        assert!(!belief.learn(Kind::Readiness, Some(true)) && belief.ready);
        assert!(!belief.learn(Kind::Readiness, Some(false)) && !belief.ready && belief.alive);
        assert!(!belief.learn(Kind::Liveness, Some(true)));
        assert!(belief.learn(Kind::Liveness, Some(false)) && !belief.alive);
        // Another probe does not bring it back.
        belief.learn(Kind::Liveness, Some(true));
        assert!(!belief.alive);
    }

    #[test]
    fn statuses_are_read_from_the_first_line() {
        assert_eq!(http_status("HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(http_status("HTTP/1.0 500 x\r\n"), Some(500));
        assert_eq!(http_status("SSH-2.0\r\n"), None);
        assert_eq!(http_status(""), None);
    }
}
