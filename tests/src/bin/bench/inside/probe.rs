//! The first byte of an answer over HTTP, asked for again and again until it comes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::agent::{ADDRESS, Place};

/// How long an agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long one attempt to connect may take. Where packets are dropped meanwhile (CRIU does that under runc), the kernel
/// would try again after a second, and that second is not the wake's.
const CONNECT: Duration = Duration::from_millis(2);

const REQUEST: &[u8] = b"GET /turn HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// The first answer of an agent.
#[derive(Debug)]
pub struct Answer {
    /// When its first byte came, after the start.
    pub first_byte: Duration,
    /// Its body.
    pub body: String,
}

/// What a client has seen that connected to a sleeping agent.
#[derive(Debug)]
pub struct Visit {
    /// How long connecting took.
    pub connected: Duration,
    /// When the first byte of the answer came, after the client had begun to connect.
    pub first_byte: Duration,
    /// The answer's body.
    pub body: String,
}

/// A thread that is ready to ask. It gives up when this is dropped: nobody waits for an agent whose wake has failed.
pub struct Probe<'scope> {
    go: Sender<Instant>,
    asking: ScopedJoinHandle<'scope, Result<Answer>>,
}

impl<'scope> Probe<'scope> {
    /// Prepares a thread that waits `pause` after each attempt that fails; gives it back once it is in the namespace.
    pub fn arm<'env>(
        scope: &'scope thread::Scope<'scope, 'env>,
        place: &'env Place,
        pause: Duration,
    ) -> Self {
        let (go, wait) = channel();
        let (ready, armed) = channel();
        let asking = scope.spawn(move || {
            enter(place)?;
            let _ = ready.send(());
            // Without a start there is nobody left to tell.
            let start = wait.recv().context("the wake was given up")?;
            ask(pause, start, &wait).with_context(|| place.id.clone())
        });
        // An error of the thread comes out when it is joined.
        let _ = armed.recv();
        Self { go, asking }
    }

    /// Begins to ask; times count from `start`.
    pub fn go(&self, start: Instant) {
        let _ = self.go.send(start);
    }

    /// Waits for the answer.
    pub fn answer(self) -> Result<Answer> {
        // `go` must live until then.
        let Self { go: _go, asking } = self;
        asking.join().unwrap_or_else(|_| Err(anyhow!("the asking thread panicked")))
    }
}

/// Asks from a thread of its own until there is an answer.
pub fn first_answer(place: &Place, pause: Duration, start: Instant) -> Result<Answer> {
    thread::scope(|scope| {
        let probe = Probe::arm(scope, place, pause);
        probe.go(start);
        probe.answer()
    })
}

/// Connects and asks once: a client that is refused or reset is an error.
pub fn visit(place: &Place) -> Result<Visit> {
    let client = || {
        enter(place)?;
        let start = Instant::now();
        attempt(start, PATIENCE).with_context(|| format!("a client of {}", place.id))
    };
    thread::scope(|scope| scope.spawn(client).join())
        .unwrap_or_else(|_| Err(anyhow!("the asking thread panicked")))
}

fn enter(place: &Place) -> Result<()> {
    move_into_link_name_space(place.network.as_fd(), Some(LinkNameSpaceType::Network))
        .context("entering an agent's network namespace")
}

fn ask(pause: Duration, start: Instant, wait: &Receiver<Instant>) -> Result<Answer> {
    let mut last = None;
    while start.elapsed() < PATIENCE {
        match attempt(start, CONNECT) {
            Ok(Visit { first_byte, body, .. }) => return Ok(Answer { first_byte, body }),
            Err(error) => last = Some(error),
        }
        if wait.try_recv() == Err(TryRecvError::Disconnected) {
            bail!("nobody waits for an answer any more");
        }
        thread::sleep(pause);
    }
    let last = last.map(|error| error.to_string()).unwrap_or_default();
    bail!("no answer over HTTP within {PATIENCE:?}: {last}")
}

fn attempt(start: Instant, connect: Duration) -> std::io::Result<Visit> {
    let mut stream = TcpStream::connect_timeout(&ADDRESS, connect)?;
    let connected = start.elapsed();
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(REQUEST)?;
    let mut bytes = vec![0; 1];
    stream.read_exact(&mut bytes)?;
    let first_byte = start.elapsed();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Ok(Visit { connected, first_byte, body })
}

/// Whether an answer is that of an agent that has just begun.
pub fn is_new(body: &str) -> bool {
    matches!(body, r#"{"turn": 0}"# | r#"{"turn": 1}"#)
}
