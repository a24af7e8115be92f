//! A gRPC probe: what comes over a new connection of HTTP/2 (RFC 9113), and what it is answered.
//!
//! A client may wait for the server's settings before it says what it wants, so the shim sends some: one stream at a time,
//! and else what holds anyway until a client has heard of more. So nothing is lost with a connection that turns out to be
//! for the agent: it gets every frame of the client but for the acknowledgement of the shim's settings, and its own settings
//! are to the client those that follow.

use tokio::io::{self, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{
    hpack,
    verdict::{LONGEST, Protocol, USER_AGENT, Verdict},
};

/// What every client says first.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PATH: &[u8] = b"/grpc.health.v1.Health/Check";
const CONTENT_TYPE: &[u8] = b"application/grpc";

/// The shim's settings: one stream. The agent may want no more than a few.
pub(super) const SETTINGS: &[u8] =
    &[0, 0, 6, kind::SETTINGS, 0, 0, 0, 0, 0, 0, setting::MAX_CONCURRENT_STREAMS, 0, 0, 0, 1];
/// That there may be as many streams as there can be, as holds where an agent says nothing about it.
const NO_LIMIT: &[u8; 6] = &[0, setting::MAX_CONCURRENT_STREAMS, 0x7f, 0xff, 0xff, 0xff];
/// The answer to a probe, after the settings: that it serves, and that nothing more is answered here.
#[rustfmt::skip]
pub(super) const SERVING: &[u8] = &[
    0, 0, 0, kind::SETTINGS, flag::ACK, 0, 0, 0, 0,
    // The client may have lowered the limit of what is remembered, and an encoder that remembers nothing says so (0x20).
    // Then `:status: 200`, and `content-type`, which the static table has.
    0, 0, 21, kind::HEADERS, flag::END_HEADERS, 0, 0, 0, 1,
    0x20, 0x88, 0x0f, 0x10, 16, b'a', b'p', b'p', b'l', b'i', b'c', b'a', b't', b'i', b'o', b'n', b'/', b'g', b'r', b'p', b'c',
    // A message of two bytes: its first field, the status, is 1.
    0, 0, 7, kind::DATA, 0, 0, 0, 0, 1,
    0, 0, 0, 0, 2, 0x08, 1,
    0, 0, 15, kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 0, 0, 0, 1,
    0, 11, b'g', b'r', b'p', b'c', b'-', b's', b't', b'a', b't', b'u', b's', 1, b'0',
    // The probe's stream was the last one, and there was no error.
    0, 0, 8, kind::GOAWAY, 0, 0, 0, 0, 0,
    0, 0, 0, 1, 0, 0, 0, 0,
];
/// How many bytes a client must be ready to receive on a stream for that.
const WINDOW: u32 = 7;

/// How long what comes before a frame's content is.
const HEAD: usize = 9;

/// Types of frames.
mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
}

/// Flags of frames.
mod flag {
    pub(super) const ACK: u8 = 1;
    pub(super) const END_STREAM: u8 = 1;
    pub(super) const END_HEADERS: u8 = 4;
}

/// Identifiers of settings, all of which begin with a zero.
mod setting {
    /// How many streams the peer may have open.
    pub(super) const MAX_CONCURRENT_STREAMS: u8 = 3;
    /// How many bytes the peer may send on a stream at first.
    pub(super) const INITIAL_WINDOW_SIZE: u8 = 4;
    /// Whether priorities of streams mean nothing (RFC 9218). To be said first or never.
    pub(super) const NO_RFC7540_PRIORITIES: u8 = 9;
}

/// What a frame begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    fn new(bytes: [u8; HEAD]) -> Self {
        let [high, middle, low, kind, flags, stream @ ..] = bytes;
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        Self { length, kind, flags, stream: u32::from_be_bytes(stream) }
    }

    fn acknowledges_settings(self) -> bool {
        self.kind == kind::SETTINGS && self.flags & flag::ACK != 0 && self.length == 0
    }
}

/// Judges what a client that begins as one of HTTP/2 has sent so far.
pub(super) fn judge(sent: &[u8]) -> Verdict {
    let compared = sent.len().min(PREFACE.len());
    if sent[..compared] != PREFACE[..compared] {
        return Verdict::Other;
    }
    let mut rest = &sent[compared..];
    let mut heard = Heard::Nothing;
    while let Some((head, after)) = rest.split_first_chunk() {
        let head = Head::new(*head);
        if head.length > LONGEST {
            return Verdict::Other;
        }
        let Some((content, after)) = after.split_at_checked(head.length) else { break };
        let Some(more) = heard.and(head, content) else { return Verdict::Other };
        (heard, rest) = (more, after);
    }
    match heard {
        Heard::Nothing => Verdict::Unclear,
        Heard::Whole(message) if !is_message(&message) => Verdict::Other,
        Heard::Whole(_) if rest.is_empty() => Verdict::Probe(Protocol::Grpc),
        _ => Verdict::Greet,
    }
}

/// How much of a probe has been heard.
enum Heard {
    Nothing,
    Settings,
    /// What is asked, and so much of the message that goes with it.
    Part(Vec<u8>),
    /// All, with this message.
    Whole(Vec<u8>),
}

impl Heard {
    /// What has been heard with one frame more; nothing when it is none of a probe.
    fn and(self, head: Head, content: &[u8]) -> Option<Self> {
        match (self, head.kind) {
            (Self::Nothing, kind::SETTINGS) => {
                (head.flags == 0 && head.stream == 0 && leave_room(content)).then_some(Self::Settings)
            }
            (Self::Nothing, _) => None,
            // About what the server sends.
            (heard, kind::WINDOW_UPDATE) => Some(heard),
            (heard, kind::SETTINGS) if head.acknowledges_settings() => Some(heard),
            // Neither padded nor in several parts, and with a message.
            (Self::Settings, kind::HEADERS) => {
                let plain = head.flags == flag::END_HEADERS && head.stream == 1;
                (plain && asks_for_health(content)).then(|| Self::Part(Vec::new()))
            }
            (Self::Part(mut message), kind::DATA) if head.stream == 1 => {
                message.extend(content);
                match head.flags {
                    0 => Some(Self::Part(message)),
                    flag::END_STREAM => Some(Self::Whole(message)),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// Whether these settings of a client let it take the answer.
fn leave_room(settings: &[u8]) -> bool {
    let (settings, rest) = settings.as_chunks();
    let small = |[high, low, value @ ..]: &[u8; 6]| {
        [*high, *low] == [0, setting::INITIAL_WINDOW_SIZE] && u32::from_be_bytes(*value) < WINDOW
    };
    rest.is_empty() && !settings.iter().any(small)
}

/// Whether this header block is that of a kubelet's probe.
fn asks_for_health(block: &[u8]) -> bool {
    let Some(fields) = hpack::fields(block) else { return false };
    let is = |wanted: &str, fits: &dyn Fn(&[u8]) -> bool| {
        let mut values = fields.iter().filter(|(name, _)| name == wanted.as_bytes()).map(|(_, value)| value);
        values.next().is_some_and(|value| fits(value)) && values.next().is_none()
    };
    is(":method", &|method| method == b"POST")
        && is(":path", &|path| path == PATH)
        && is("content-type", &|content| content.starts_with(CONTENT_TYPE))
        && is("user-agent", &|agent| agent.starts_with(USER_AGENT))
}

/// Whether this is one message of gRPC, and not compressed. It names a service, or none.
fn is_message(bytes: &[u8]) -> bool {
    let Some(([0, length @ ..], message)) = bytes.split_first_chunk::<5>() else { return false };
    usize::try_from(u32::from_be_bytes(*length)) == Ok(message.len())
}

/// Passes what a client says on to the agent, up to the acknowledgement of the shim's settings and without that.
pub(super) async fn pass_on(
    mut client: impl AsyncRead + Unpin,
    agent: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut preface = (&mut client).take(PREFACE.len() as u64);
    io::copy(&mut preface, agent).await?;
    loop {
        let mut bytes = Vec::with_capacity(HEAD);
        (&mut client).take(HEAD as u64).read_to_end(&mut bytes).await?;
        let Some(head) = bytes.as_array().map(|bytes| Head::new(*bytes)) else {
            // It has ended.
            return agent.write_all(&bytes).await;
        };
        if head.acknowledges_settings() {
            return Ok(());
        }
        agent.write_all(&bytes).await?;
        io::copy(&mut (&mut client).take(head.length as u64), agent).await?;
    }
}

/// Passes the agent's first settings on to a client, to which they are those that follow the shim's.
pub(super) async fn pass_settings_on(
    mut agent: impl AsyncRead + Unpin,
    client: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEAD);
    (&mut agent).take(HEAD as u64).read_to_end(&mut bytes).await?;
    let head = bytes.as_array().map(|bytes| Head::new(*bytes));
    let Some(length) = head.filter(|head| head.kind == kind::SETTINGS).map(|head| head.length) else {
        return client.write_all(&bytes).await;
    };
    let mut settings = Vec::new();
    agent.take(length as u64).read_to_end(&mut settings).await?;
    let (each, rest) = settings.as_chunks::<6>();
    if settings.len() == length && rest.is_empty() {
        let mut all = vec![*NO_LIMIT];
        all.extend(each.iter().filter(|one| !one.starts_with(&[0, setting::NO_RFC7540_PRIORITIES])));
        settings = all.concat();
        // Its length is that of a frame, which has three bytes, and that of one setting.
        bytes[..3].copy_from_slice(&settings.len().to_be_bytes()[size_of::<usize>() - 3..]);
    }
    bytes.extend(settings);
    client.write_all(&bytes).await
}

#[cfg(test)]
mod tests;
