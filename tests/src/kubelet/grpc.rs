//! Unary calls of gRPC: one message of protobuf there and one back, over a fresh connection of HTTP/2.
//!
//! A connection for each call costs half a millisecond and spares all that sharing would need: calls come from many
//! threads, and the runtime is restarted between them.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::io::{AsyncRead, AsyncWrite};

use super::error::{KubeletError, Result};

/// The codes of gRPC that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Success.
    Ok,
    /// The time that the caller gave was over.
    DeadlineExceeded,
    /// No such thing.
    NotFound,
    /// The thing exists already.
    AlreadyExists,
    /// The server has no such method.
    Unimplemented,
    /// The server does not serve now.
    Unavailable,
    /// Any other.
    Other(u32),
}

impl From<u32> for Code {
    fn from(number: u32) -> Self {
        match number {
            0 => Self::Ok,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            12 => Self::Unimplemented,
            14 => Self::Unavailable,
            other => Self::Other(other),
        }
    }
}

/// What is called, on whose behalf.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    /// Such as `/runtime.v1.RuntimeService/Version`.
    pub(super) path: &'a str,
    pub(super) user_agent: &'a str,
    /// For both sides: the server is told of it.
    pub(super) timeout: Duration,
}

/// Makes one call over `stream`, which is used up.
pub(super) async fn unary<Q: Message, A: Message>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    call: Call<'_>,
    request: &Q,
) -> Result<A> {
    let failed = |reason: &dyn ToString| KubeletError::transport(call.path, &reason.to_string());
    let (client, connection) = h2::client::handshake(stream).await.map_err(|error| failed(&error))?;
    let connection = tokio::spawn(connection);
    let answered =
        tokio::time::timeout(call.timeout, exchange(client, call, frame(request, call.path)?)).await;
    connection.abort();
    let message =
        answered.map_err(|_| KubeletError::Timeout { call: call.path.into(), after: call.timeout })??;
    A::parse_from_bytes(&message).map_err(|error| failed(&error))
}

/// The message as gRPC frames it: a byte that says that it is not compressed, the length, the bytes.
fn frame(message: &impl Message, call: &str) -> Result<Bytes> {
    let bytes = message.write_to_bytes().map_err(|error| KubeletError::transport(call, &error))?;
    let length = u32::try_from(bytes.len())
        .map_err(|_| KubeletError::transport(call, &"the message is larger than 4 GiB"))?;
    let mut framed = BytesMut::with_capacity(bytes.len() + 5);
    framed.put_u8(0);
    framed.put_u32(length);
    framed.put_slice(&bytes);
    Ok(framed.freeze())
}

async fn exchange(client: SendRequest<Bytes>, call: Call<'_>, body: Bytes) -> Result<Bytes> {
    let failed = |reason: &dyn ToString| KubeletError::transport(call.path, &reason.to_string());
    let request = Request::post(format!("http://localhost{}", call.path))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", call.user_agent)
        .header("grpc-timeout", format!("{}m", call.timeout.as_millis()))
        .body(())
        .map_err(|error| failed(&error))?;
    let mut client = client.ready().await.map_err(|error| failed(&error))?;
    let (answer, mut sending) = client.send_request(request, false).map_err(|error| failed(&error))?;
    sending.send_data(body, true).map_err(|error| failed(&error))?;
    let (head, mut body) = answer.await.map_err(|error| failed(&error))?.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|error| failed(&error))?;
        body.flow_control().release_capacity(chunk.len()).map_err(|error| failed(&error))?;
        bytes.put(chunk);
    }
    // An answer that is only an error has its status in the head.
    let trailers = body.trailers().await.map_err(|error| failed(&error))?;
    match status(trailers.as_ref().unwrap_or(&head.headers)) {
        Some((Code::Ok, _)) => unframe(bytes.freeze()).ok_or_else(|| failed(&"half a message came")),
        Some((code, message)) => Err(KubeletError::Status { call: call.path.into(), code, message }),
        None => Err(failed(&format!("the answer has no status of gRPC (HTTP status {})", head.status))),
    }
}

fn unframe(mut bytes: Bytes) -> Option<Bytes> {
    let compressed = bytes.try_get_u8().ok()?;
    let length = bytes.try_get_u32().ok()?;
    (compressed == 0 && bytes.len() == usize::try_from(length).ok()?).then_some(bytes)
}

fn status(headers: &HeaderMap) -> Option<(Code, String)> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let code: u32 = text("grpc-status")?.parse().ok()?;
    Some((Code::from(code), unescape(text("grpc-message").unwrap_or_default())))
}

/// Messages are percent-encoded; what is not well encoded stays as it is.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let decoded = tail
            .get(..2)
            .filter(|_| *first == b'%')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(decoded.unwrap_or(*first));
        rest = if decoded.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::api::{VersionRequest, VersionResponse};
    use super::*;

    const CALL: Call<'static> =
        Call { path: "/x.Y/Z", user_agent: "test", timeout: Duration::from_millis(300) };

    /// Serves one call: checks the request and sends what `answer` makes.
    async fn call(
        answer: impl AsyncFnOnce(h2::server::SendResponse<Bytes>) + Send + 'static,
    ) -> Result<VersionResponse> {
        let (ours, theirs) = tokio::io::duplex(4096);
        let local = tokio::task::LocalSet::new();
        local.spawn_local(async move {
            let mut server = h2::server::handshake(theirs).await.unwrap();
            let (request, respond) = server.accept().await.unwrap().unwrap();
            assert_eq!(request.uri().path(), "/x.Y/Z");
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(request.headers()["grpc-timeout"], "300m");
            assert_eq!(request.headers()["user-agent"], "test");
            answer(respond).await;
            while server.accept().await.is_some() {}
        });
        let request = VersionRequest { version: "v1".into(), ..Default::default() };
        local.run_until(unary(ours, CALL, &request)).await
    }

    fn trailers(status: &str, message: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", status.parse().unwrap());
        headers.insert("grpc-message", message.parse().unwrap());
        headers
    }

    #[tokio::test]
    async fn an_answer_in_pieces_is_put_together() {
        let answer = call(async |mut respond| {
            let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
            let message = VersionResponse { runtime_name: "a".repeat(9000), ..Default::default() };
            let mut framed = frame(&message, "").unwrap();
            stream.send_data(framed.split_to(3), false).unwrap();
            stream.send_data(framed, false).unwrap();
            stream.send_trailers(trailers("0", "")).unwrap();
        })
        .await;
        assert_eq!(answer.unwrap().runtime_name.len(), 9000);
    }

    #[tokio::test]
    async fn an_error_comes_with_its_code_and_its_words() {
        let error = call(async |mut respond| {
            let mut head = http::Response::new(());
            *head.headers_mut() = trailers("5", "no%20such%0Apod");
            respond.send_response(head, true).unwrap();
        })
        .await
        .unwrap_err();
        assert_eq!(error.code(), Some(Code::NotFound));
        assert!(error.to_string().ends_with("no such\npod"), "{error}");
    }

    #[tokio::test]
    async fn half_an_answer_and_none_are_errors() {
        let half = call(async |mut respond| {
            let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
            stream.send_data(Bytes::from_static(&[0, 0, 0, 0, 9, 1]), false).unwrap();
            stream.send_trailers(trailers("0", "")).unwrap();
        })
        .await;
        assert!(half.unwrap_err().to_string().contains("half a message"));
        let none = call(async |_respond| tokio::time::sleep(Duration::from_secs(9)).await).await;
        assert!(matches!(none.unwrap_err(), KubeletError::Timeout { .. }));
    }

    #[test]
    fn escapes_are_read_and_what_is_none_stays() {
        assert_eq!(unescape("a%3A b%"), "a: b%");
        assert_eq!(unescape("%zz%C3%A9"), "%zzé");
    }
}
