//! HTTP from the host to agents, through sockets made in the agent's network namespace.

use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::error::{Doing as _, NodeError, Result};
use crate::patience::scaled;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The status, such as 200.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Connects from within a network namespace. The stream can then be used anywhere: sockets stay where they were made.
///
/// # Errors
/// When nothing listens or `timeout` passes.
pub fn connect(namespace: &OwnedFd, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let timeout = scaled(timeout);
    let doing = || format!("connecting to {address}");
    let connected = within(namespace, || TcpStream::connect_timeout(&address, timeout));
    let stream = connected.doing(doing)?;
    stream.set_read_timeout(Some(timeout)).doing(doing)?;
    stream.set_write_timeout(Some(timeout)).doing(doing)?;
    stream.set_nodelay(true).doing(doing)?;
    Ok(stream)
}

/// Does `work` in a network namespace. On a thread of its own, because entering a namespace changes the thread for good;
/// threads that it starts are in there too.
pub(super) fn within<T: Send>(
    namespace: &OwnedFd,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Sends one request over a fresh connection and reads the answer to the connection's end.
///
/// # Errors
/// When the connection breaks or the answer is not HTTP.
pub fn request(mut stream: TcpStream, method: &str, path: &str, body: &str) -> Result<Reply> {
    let doing = || format!("{method} {path}");
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n");
    // Writing to a string can't fail.
    let _ = write!(text, "Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).doing(doing)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).doing(doing)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    parse(&answer)
        .ok_or_else(|| NodeError::Answer { what: format!("the answer to {} is not HTTP", doing()), answer })
}

/// Sends one request over a connection that stays open, and reads no more than its answer.
///
/// # Errors
/// When the connection breaks or the answer is not HTTP with its length.
pub fn ask(stream: &mut TcpStream, method: &str, path: &str, body: &str) -> Result<Reply> {
    let doing = || format!("{method} {path} on an open connection");
    let text =
        format!("{method} {path} HTTP/1.1\r\nHost: agent\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).doing(doing)?;
    let mut lines = BufReader::new(stream);
    let mut answer = String::new();
    while !answer.ends_with("\r\n\r\n") {
        if lines.read_line(&mut answer).doing(doing)? == 0 {
            return Err(NodeError::Answer { what: format!("{} was not answered in full", doing()), answer });
        }
    }
    let length = answer.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let mut bytes = vec![0; length.unwrap_or(0)];
    lines.read_exact(&mut bytes).doing(doing)?;
    answer.push_str(&String::from_utf8_lossy(&bytes));
    parse(&answer)
        .ok_or_else(|| NodeError::Answer { what: format!("the answer to {} is not HTTP", doing()), answer })
}

fn parse(answer: &str) -> Option<Reply> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some(Reply { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_split_and_nonsense_is_refused() {
        let reply = parse("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
        assert_eq!(reply, Some(Reply { status: 200, body: "hi".into() }));
        assert_eq!(parse(""), None);
        assert_eq!(parse("HTTP/1.1 abc\r\n\r\n"), None);
        assert_eq!(parse("HTTP/1.1 200 OK\r\n"), None);
    }
}
