#!/usr/bin/python3
"""Answers gRPC's health check at PORT (9090): SERVING, whatever service is asked for. No more of HTTP/2 than that takes."""

import asyncio
import os

DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def field(name, value):
    """A header field that is not to be indexed."""
    return bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def serving(stream):
    status_200 = b"\x88"
    message = b"\x08\x01"
    return (
        frame(HEADERS, END_HEADERS, stream, status_200 + field("content-type", "application/grpc"))
        + frame(DATA, 0, stream, b"\0" + len(message).to_bytes(4) + message)
        + frame(HEADERS, END_HEADERS | END_STREAM, stream, field("grpc-status", "0"))
    )


async def serve(reader, writer):
    try:
        if await reader.readexactly(len(PREFACE)) != PREFACE:
            return
        writer.write(frame(SETTINGS, 0, 0))
        while True:
            head = await reader.readexactly(9)
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:])
            payload = await reader.readexactly(int.from_bytes(head[:3]))
            if kind in (SETTINGS, PING) and not flags & ACK:
                writer.write(frame(kind, ACK, 0, payload if kind == PING else b""))
            elif kind in (DATA, HEADERS) and flags & END_STREAM:
                writer.write(serving(stream))
            elif kind == GOAWAY:
                return
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main():
    port = int(os.environ.get("PORT", "9090"))
    server = await asyncio.start_server(serve, "0.0.0.0", port)
    print(f"listening on {port}", flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
