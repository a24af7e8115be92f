//! Calls of gRPC's health service, with a client of HTTP/2.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::net::TcpStream;

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;

use crate::cycle::SOON;

/// A connection of HTTP/2, over which any number of calls can be made.
pub async fn channel(stream: TcpStream) -> SendRequest<Bytes> {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Asks gRPC's health service in the name of a user agent, and sees to it that the server serves.
pub async fn check(client: &mut SendRequest<Bytes>, user_agent: &str) {
    let request = http::Request::post("http://agent/grpc.health.v1.Health/Check")
        .header("content-type", "application/grpc")
        .header("user-agent", user_agent)
        .header("te", "trailers")
        .body(())
        .unwrap();
    std::future::poll_fn(|context| client.poll_ready(context)).await.unwrap();
    let (answer, mut sending) = client.send_request(request, false).unwrap();
    // An empty message, not compressed.
    sending.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
    let mut body = tokio::time::timeout(SOON, answer).await.unwrap().unwrap().into_body();
    let mut bytes = BytesMut::new();
    while let Some(chunk) = body.data().await {
        bytes.put(chunk.unwrap());
    }
    // SERVING.
    assert_eq!(bytes.as_ref(), [0, 0, 0, 0, 2, 8, 1]);
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
}
