//! Exec, attach and port-forward: websockets to containerd's streaming server, as a kubelet's proxy opens them.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::{Message, WebSocket};

use super::error::{Doing as _, KubeletError, Result};
use crate::node::Node;

/// The protocol of Kubernetes on top of websockets: the first byte of each message names the channel.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// How long a stream may be silent.
const SILENCE: Duration = Duration::from_secs(30);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// The channels of a forwarded port.
const DATA: u8 = 0;
const ERROR: u8 = 1;

/// How a streamed command ended, and what it wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Finished {
    /// Its standard output; all output of a terminal.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit status; none when the stream ended without one, as one does that was attached.
    pub status: Option<i32>,
}

/// The streams of a command or of a container's first process. Dropping it detaches.
#[derive(Debug)]
pub struct Session {
    socket: Socket,
    seen: Finished,
}

impl Session {
    pub(super) fn open(node: &Node, url: &str) -> Result<Self> {
        Ok(Self { socket: Socket::open(node, url)?, seen: Finished::default() })
    }

    /// Sends input.
    ///
    /// # Errors
    /// When the stream is broken.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.socket.send(STDIN, text.as_bytes())
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    /// When the stream is broken.
    pub fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        self.socket.send(RESIZE, format!(r#"{{"Width":{width},"Height":{height}}}"#).as_bytes())
    }

    /// Reads until the standard output holds `text`; gives back all of the output so far.
    ///
    /// # Errors
    /// When it does not come within half a minute, or the stream ends.
    pub fn read_until(&mut self, text: &str) -> Result<&str> {
        let begun = Instant::now();
        while !self.seen.stdout.contains(text) {
            let late = begun.elapsed() > SILENCE;
            if late || !self.step()? {
                let reason = format!("{text:?} did not come, but {:?}", self.seen);
                return Err(KubeletError::stream(&self.socket.url, &reason));
            }
        }
        Ok(&self.seen.stdout)
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// When there is silence for half a minute.
    pub fn finish(mut self) -> Result<Finished> {
        while self.step()? {}
        Ok(self.seen)
    }

    /// Reads one message. Gives back whether more may come.
    fn step(&mut self) -> Result<bool> {
        let Some((channel, bytes)) = self.socket.receive()? else { return Ok(false) };
        let text = String::from_utf8_lossy(&bytes);
        match channel {
            STDOUT => self.seen.stdout.push_str(&text),
            STDERR => self.seen.stderr.push_str(&text),
            STATUS => {
                self.seen.status = exit_status(&text);
                if self.seen.status.is_none() {
                    return Err(KubeletError::stream(&self.socket.url, &text));
                }
            }
            _ => {}
        }
        Ok(true)
    }
}

/// The exit status in what the server says at the end of a command.
fn exit_status(text: &str) -> Option<i32> {
    let status: Value = serde_json::from_str(text).ok()?;
    if status["status"] == "Success" {
        return Some(0);
    }
    let causes = status["details"]["causes"].as_array()?;
    let cause = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
    cause["message"].as_str()?.parse().ok()
}

/// A connection to a forwarded port.
#[derive(Debug)]
pub struct Forward {
    socket: Socket,
}

impl Forward {
    pub(super) fn open(node: &Node, url: &str) -> Result<Self> {
        let mut socket = Socket::open(node, url)?;
        // Each channel begins with the number of its port.
        for _ in [DATA, ERROR] {
            socket.receive()?;
        }
        Ok(Self { socket })
    }

    /// Sends bytes to the port.
    ///
    /// # Errors
    /// When the stream is broken.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.socket.send(DATA, bytes)
    }

    /// Reads all that comes until the port's side ends the connection.
    ///
    /// # Errors
    /// When forwarding fails: nothing listens there, or the connection breaks.
    pub fn read_to_end(mut self) -> Result<String> {
        let mut bytes = Vec::new();
        while let Some((channel, mut more)) = self.socket.receive()? {
            if channel == ERROR {
                return Err(KubeletError::stream(&self.socket.url, &String::from_utf8_lossy(&more)));
            }
            bytes.append(&mut more);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// A websocket with channels.
#[derive(Debug)]
struct Socket {
    inner: WebSocket<TcpStream>,
    url: String,
}

impl Socket {
    /// The server listens on the node's own loopback interface.
    fn open(node: &Node, url: &str) -> Result<Self> {
        let failed = |reason: &dyn ToString| KubeletError::stream(url, &reason.to_string());
        let url_ws = url.replacen("http://", "ws://", 1);
        let mut request = url_ws.as_str().into_client_request().map_err(|error| failed(&error))?;
        let protocol = http::HeaderValue::from_static(PROTOCOL);
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
        let address: SocketAddr = request
            .uri()
            .authority()
            .and_then(|authority| authority.as_str().parse().ok())
            .ok_or_else(|| failed(&"this address has no host and port"))?;
        let stream = node.connect(address, SILENCE)?;
        let (inner, _) = tungstenite::client(request, stream).map_err(|error| failed(&error))?;
        Ok(Self { inner, url: url.to_owned() })
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend_from_slice(bytes);
        let sent = self.inner.send(Message::Binary(message.into()));
        sent.map_err(std::io::Error::other).doing(&self.url)
    }

    /// The next message that has a channel and something in it; nothing at the end.
    fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        use tungstenite::Error;
        use tungstenite::error::ProtocolError;
        loop {
            match self.inner.read() {
                Ok(Message::Binary(bytes)) => match bytes.split_first() {
                    Some((channel, rest)) if !rest.is_empty() => return Ok(Some((*channel, rest.to_vec()))),
                    _ => {}
                },
                Ok(Message::Close(_))
                | Err(
                    Error::ConnectionClosed
                    | Error::AlreadyClosed
                    | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake),
                ) => return Ok(None),
                Ok(_) => {}
                Err(error) => return Err(KubeletError::stream(&self.url, &error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_stands_among_the_causes() {
        let failed = r#"{"metadata":{},"status":"Failure","message":"command terminated with non-zero exit code",
            "reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(exit_status(failed), Some(3));
        assert_eq!(exit_status(r#"{"metadata":{},"status":"Success"}"#), Some(0));
        assert_eq!(exit_status(r#"{"status":"Failure","message":"no"}"#), None);
        assert_eq!(exit_status("no"), None);
    }
}
