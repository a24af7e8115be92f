//! One connection from a probe's address, accepted in the agent's stead.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    pin::{Pin, pin},
    time::Duration,
};

use criu_hooks::netns;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout, timeout_at},
};
use tracing::{debug, info};

use super::{
    http2,
    verdict::{LONGEST, Protocol, Verdict, judge},
};

/// Who says nothing for so long, and stays, is no probe. A kubelet sends its request at once, or closes at once.
const SILENCE: Duration = Duration::from_millis(500);
/// A probe has been understood by then.
const PATIENCE: Duration = Duration::from_secs(1);
/// A gRPC probe, whose client has been sent settings, has been understood by then. Who has asked for nothing yet loses
/// nothing by that, and a kubelet may be slow on a busy node.
const PATIENCE_WHEN_GREETED: Duration = Duration::from_secs(3);
/// When the connection of a client that has vanished is asked whether it still is one.
const KEEPALIVE: Duration = Duration::from_mins(1);

const ASLEEP: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\nConnection: close\r\n\r\nasleep\n";

/// What passes the words of one on to the other.
type Direction<'direction> = Pin<&'direction mut (dyn Future<Output = io::Result<()>> + Send)>;

/// What a client wanted.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// To connect, and no more: a TCP probe.
    Nothing,
    /// These words in answer to a probe.
    Answer(Protocol, Vec<u8>),
    /// The agent, to which it has said this.
    Agent(Said),
}

/// What a client has said to the shim.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    bytes: Vec<u8>,
    /// The client speaks HTTP/2, and has been sent settings.
    greeted: bool,
}

/// Answers `client` if it is a probe, and else connects it to the agent in the network namespace `namespace`.
pub(super) async fn attend(mut client: TcpStream, peer: SocketAddr, namespace: impl AsFd) {
    match hear(&mut client).await {
        Heard::Nothing => debug!(%peer, "TCP probe answered"),
        Heard::Answer(protocol, words) => match answer(&mut client, &words).await {
            Ok(()) => debug!(%peer, ?protocol, "probe answered"),
            Err(error) => debug!(%peer, %error, "the probe did not wait for its answer"),
        },
        Heard::Agent(said) => pass_on(client, peer, &said, namespace).await,
    }
}

/// Connects `client` to the agent, which gets what it has `said`, and all else that either says, until both have ended.
pub(super) async fn pass_on(mut client: TcpStream, peer: SocketAddr, said: &Said, namespace: impl AsFd) {
    info!(%peer, bytes = said.bytes.len(), "no probe: it is connected to the agent");
    let passed = async {
        client.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&client, true)?;
        sockopt::set_tcp_keepidle(&client, KEEPALIVE)?;
        let mut agent = connect(namespace, client.local_addr()?).await?;
        let joined = join(&mut client, &mut agent, said).await;
        joined.inspect_err(|_| reset_on_close(&agent))
    };
    if let Err(error) = passed.await {
        debug!(%peer, %error, "the connection has broken");
        // Whoever has reset it: the other learns of that, rather than take it for an end in good order.
        reset_on_close(&client);
    }
}

/// Listens to a client until it is clear what it wants.
async fn hear(client: &mut TcpStream) -> Heard {
    let begun = Instant::now();
    let mut said = Said::default();
    let mut buffer = vec![0; LONGEST];
    loop {
        let until = if said.greeted {
            begun + PATIENCE_WHEN_GREETED
        } else {
            (Instant::now() + SILENCE).min(begun + PATIENCE)
        };
        match timeout_at(until, client.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) if said.bytes.is_empty() => return Heard::Nothing,
            Ok(Ok(0) | Err(_)) | Err(_) => return Heard::Agent(said),
            Ok(Ok(length)) => said.bytes.extend(&buffer[..length]),
        }
        match judge(&said.bytes) {
            Verdict::Unclear => {}
            Verdict::Greet if said.greeted => {}
            Verdict::Greet => {
                said.greeted = true;
                // Whoever is gone is found to be so by the next read.
                let _ = client.write_all(http2::SETTINGS).await;
            }
            Verdict::Probe(protocol) => return Heard::Answer(protocol, words(protocol, said.greeted)),
            Verdict::Other => return Heard::Agent(said),
        }
    }
}

/// What a probe is answered, whose client has been `greeted` or not.
fn words(protocol: Protocol, greeted: bool) -> Vec<u8> {
    match protocol {
        Protocol::Http => ASLEEP.to_vec(),
        Protocol::Grpc if greeted => http2::SERVING.to_vec(),
        Protocol::Grpc => [http2::SETTINGS, http2::SERVING].concat(),
    }
}

async fn answer(client: &mut TcpStream, words: &[u8]) -> io::Result<()> {
    client.write_all(words).await?;
    client.shutdown().await?;
    // To close before the client does would be a reset, should it still send something.
    let _ = timeout(PATIENCE, tokio::io::copy(client, &mut tokio::io::sink())).await;
    Ok(())
}

/// Passes what either says on to the other, and each end, until both have ended.
async fn join(client: &mut TcpStream, agent: &mut TcpStream, said: &Said) -> io::Result<()> {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_agent, mut to_agent) = agent.split();
    let mut up = pin!(async {
        let mut from_client = said.bytes.chain(&mut from_client);
        if said.greeted {
            http2::pass_on(&mut from_client, &mut to_agent).await?;
        }
        tokio::io::copy(&mut from_client, &mut to_agent).await?;
        to_agent.shutdown().await
    });
    let mut down = pin!(async {
        if said.greeted {
            http2::pass_settings_on(&mut from_agent, &mut to_client).await?;
        }
        tokio::io::copy(&mut from_agent, &mut to_client).await?;
        to_client.shutdown().await
    });
    let (ended, mut other) = tokio::select! {
        ended = &mut up => (ended, down as Direction),
        ended = &mut down => (ended, up as _),
    };
    match ended {
        Ok(()) => other.await,
        Err(error) => {
            // An agent may refuse a request before it has read all of it: its last words still arrive.
            let _ = timeout(PATIENCE, &mut other).await;
            Err(error)
        }
    }
}

fn reset_on_close(stream: &TcpStream) {
    // The socket is closed in any case.
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

/// Connects to the agent's `address` in the network namespace `namespace`. The connection waits in the queue of the
/// agent's listener as that of any client does, and wakes the agent.
async fn connect(namespace: impl AsFd, address: SocketAddr) -> io::Result<TcpStream> {
    let address = match address {
        // A listener of both families.
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            SocketAddr::new(v6.ip().to_canonical(), v6.port())
        }
        other => other,
    };
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket: OwnedFd = netns::within(namespace.as_fd(), || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(net::socket_with(family, SocketType::STREAM, flags, None)?)
    })?;
    let socket = TcpSocket::from_std_stream(socket.into());
    socket.set_nodelay(true)?;
    // From the very address, by which it is known not to be a probe.
    let mut own = address;
    own.set_port(0);
    socket.bind(own)?;
    socket.connect(address).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;

    use bytes::Bytes;
    use http::HeaderMap;
    use tokio::net::TcpListener;

    use super::*;

    /// A client of nobody: its own end, and the end that is attended to.
    async fn pair() -> (TcpStream, TcpStream, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (served, _) = listener.accept().await.unwrap();
        (client, served, listener)
    }

    #[tokio::test]
    async fn who_connects_and_leaves_wants_nothing() {
        let (client, mut served, _listener) = pair().await;
        drop(client);
        assert_eq!(hear(&mut served).await, Heard::Nothing);
    }

    #[tokio::test]
    async fn who_stays_and_says_nothing_wants_the_agent() {
        let (_client, mut served, _listener) = pair().await;
        let begun = Instant::now();
        assert_eq!(hear(&mut served).await, Heard::Agent(Said::default()));
        assert!(begun.elapsed() < PATIENCE);
    }

    #[tokio::test]
    async fn who_never_comes_to_an_end_wants_the_agent() {
        let (mut client, mut served, _listener) = pair().await;
        let begun = Instant::now();
        let slow = tokio::spawn(async move {
            client.write_all(b"GET /").await.unwrap();
            while client.write_all(b"a").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        let heard = hear(&mut served).await;
        assert!(matches!(&heard, Heard::Agent(said) if said.bytes.starts_with(b"GET /a")), "{heard:?}");
        assert!((PATIENCE..PATIENCE * 3).contains(&begun.elapsed()));
        slow.abort();
    }

    /// The agent of this test answers with what it has heard, once it has heard all.
    #[tokio::test]
    async fn the_agent_gets_all_and_ends_are_passed_on_one_by_one() {
        let (mut client, served, listener) = pair().await;
        let namespace = File::open("/proc/self/ns/net").unwrap();
        let peer = client.local_addr().unwrap();
        let attended = tokio::spawn(async move { attend(served, peer, &namespace).await });
        let sent: Vec<u8> = (0..1_000_000u32).map(|number| number.to_le_bytes()[0]).collect();
        let agent = tokio::spawn(async move {
            let (mut agent, from) = listener.accept().await.unwrap();
            assert_eq!(from.ip(), agent.local_addr().unwrap().ip());
            let mut heard = Vec::new();
            agent.read_to_end(&mut heard).await.unwrap();
            agent.write_all(&heard).await.unwrap();
        });
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut echoed = Vec::new();
        client.read_to_end(&mut echoed).await.unwrap();
        assert!(echoed == sent, "{} bytes came back of {}", echoed.len(), sent.len());
        agent.await.unwrap();
        attended.await.unwrap();
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_as_such() {
        let (mut client, served, listener) = pair().await;
        let namespace = File::open("/proc/self/ns/net").unwrap();
        let peer = client.local_addr().unwrap();
        let attended = tokio::spawn(async move { attend(served, peer, &namespace).await });
        client.write_all(b"hello").await.unwrap();
        let (mut agent, _) = listener.accept().await.unwrap();
        agent.read_exact(&mut [0; 5]).await.unwrap();
        reset_on_close(&agent);
        drop(agent);
        let error = client.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        attended.await.unwrap();
    }

    #[tokio::test]
    async fn a_probe_is_answered_in_good_order() {
        let (mut client, served, _listener) = pair().await;
        let namespace = File::open("/proc/self/ns/net").unwrap();
        let peer = client.local_addr().unwrap();
        let attended = tokio::spawn(async move { attend(served, peer, &namespace).await });
        client.write_all(b"GET /live HTTP/1.1\r\nUser-Agent: kube-probe/1.33\r\n\r\n").await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nasleep\n"), "{text}");
        drop(client);
        attended.await.unwrap();
    }

    #[tokio::test]
    async fn who_speaks_http_2_is_greeted_once_and_is_heard_until_it_is_clear_what_it_wants() {
        let (mut client, mut served, _listener) = pair().await;
        let heard = tokio::spawn(async move { (hear(&mut served).await, served) });
        let settings = [http2::PREFACE, http2::SETTINGS].concat();
        client.write_all(&settings).await.unwrap();
        let mut greeting = vec![0; http2::SETTINGS.len()];
        client.read_exact(&mut greeting).await.unwrap();
        assert_eq!(greeting, http2::SETTINGS);
        // An acknowledgement, half of a frame, and nothing more.
        let more = [0, 0, 0, 4, 1, 0, 0, 0, 0, 0, 0];
        client.write_all(&more).await.unwrap();
        let (heard, mut served) = heard.await.unwrap();
        let bytes = [settings.as_slice(), &more].concat();
        assert_eq!(heard, Heard::Agent(Said { bytes, greeted: true }));
        served.write_all(b"!").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'!', "it was greeted twice");
    }

    /// A client of gRPC with a connection of its own, which goes on as long as it does.
    async fn call(client: TcpStream, path: &str, agent: &str, body: Bytes) -> (Bytes, HeaderMap) {
        let (mut calls, connection) = h2::client::handshake(client).await.unwrap();
        // A kubelet waits for the settings of the server.
        let greeted = tokio::spawn(connection);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let request = http::Request::post(format!("http://agent{path}"))
            .header("content-type", "application/grpc")
            .header("user-agent", agent)
            .body(())
            .unwrap();
        let (answer, mut sending) = calls.send_request(request, false).unwrap();
        sending.send_data(body, true).unwrap();
        let mut body = answer.await.unwrap().into_body();
        let mut answer = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.unwrap();
            body.flow_control().release_capacity(chunk.len()).unwrap();
            answer.extend(chunk);
        }
        let trailers = body.trailers().await.unwrap().unwrap();
        drop((calls, body, sending));
        greeted.await.unwrap().unwrap();
        (answer.into(), trailers)
    }

    #[tokio::test]
    async fn a_probe_of_grpc_is_answered_that_it_serves() {
        let (client, served, _listener) = pair().await;
        let namespace = File::open("/proc/self/ns/net").unwrap();
        let peer = client.local_addr().unwrap();
        let attended = tokio::spawn(async move { attend(served, peer, &namespace).await });
        let path = "/grpc.health.v1.Health/Check";
        let (answer, trailers) =
            call(client, path, "kube-probe/1.36 grpc-go/1.72", Bytes::from_static(&[0; 5])).await;
        assert_eq!(*answer, [0, 0, 0, 0, 2, 8, 1]);
        assert_eq!(trailers["grpc-status"], "0");
        attended.await.unwrap();
    }

    /// The agent of this test has settings of its own, and answers with what it has heard.
    #[tokio::test]
    async fn another_call_reaches_the_agent_whole_over_the_same_connection() {
        let (client, served, listener) = pair().await;
        let namespace = File::open("/proc/self/ns/net").unwrap();
        let peer = client.local_addr().unwrap();
        let attended = tokio::spawn(async move { attend(served, peer, &namespace).await });
        let agent = tokio::spawn(async move {
            let (agent, _) = listener.accept().await.unwrap();
            let mut settings = h2::server::Builder::new();
            settings.initial_window_size(1000).max_frame_size(20_000).max_concurrent_streams(1);
            let mut connection = settings.handshake::<_, Bytes>(agent).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!(request.uri().path(), "/agent/Ask");
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
                while let Some(chunk) = body.data().await {
                    let chunk = chunk.unwrap();
                    body.flow_control().release_capacity(chunk.len()).unwrap();
                    answer.send_data(chunk, false).unwrap();
                }
                let trailers = HeaderMap::from_iter([(
                    http::HeaderName::from_static("grpc-status"),
                    "0".parse().unwrap(),
                )]);
                answer.send_trailers(trailers).unwrap();
            });
            while connection.accept().await.is_some() {}
        });
        let large: Bytes = (0..1_000_000u32).map(|number| number.to_le_bytes()[0]).collect();
        let (answer, trailers) = call(client, "/agent/Ask", "grpc-go/1.72", large.clone()).await;
        assert!(answer == large, "{} bytes came back of {}", answer.len(), large.len());
        assert_eq!(trailers["grpc-status"], "0");
        agent.await.unwrap();
        attended.await.unwrap();
    }
}
