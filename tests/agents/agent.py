#!/usr/bin/python3
"""An agent: an HTTP server that remembers a conversation. Its whole state is in memory.

PORT          where it listens (8080)
BALLAST_MIB   MiB of random bytes that it holds besides (0)
TERM_STATUS   exit status on SIGTERM; without it SIGTERM does what the system does by default
BIND          address to listen on (0.0.0.0)

GET /health, GET /turn, GET /digest, POST /chat with a text, POST /exit with a status
"""

import asyncio
import hashlib
import json
import os
import signal

MIB = 1 << 20

ballast = [os.urandom(MIB) for _ in range(int(os.environ.get("BALLAST_MIB", "0")))]
conversation = []


def turns():
    return len(conversation) // 2


def chat(text):
    number = turns() + 1
    before = conversation[-2] if conversation else None
    reply = f"{number}: you said {text!r}, and before that {before!r}"
    conversation.extend([text, reply])
    print(f"turn {number}", flush=True)
    return {"turn": number, "history": len(conversation), "reply": reply}


def digest():
    state = hashlib.sha256()
    for block in ballast:
        state.update(block)
    for entry in conversation:
        state.update(entry.encode() + b"\0")
    return state.hexdigest()


def answer(method, path, body):
    match method, path:
        case "GET", "/health":
            return 200, "ok"
        case "GET", "/turn":
            return 200, json.dumps({"turn": turns()})
        case "GET", "/digest":
            return 200, digest()
        case "POST", "/chat":
            return 200, json.dumps(chat(body.decode(errors="replace")))
        case "POST", "/exit":
            os._exit(int(body or b"0"))
        case _:
            return 404, "no such thing"


async def serve(reader, writer):
    try:
        while line := await reader.readline():
            method, path, _ = line.decode("latin-1").split(" ", 2)
            headers = {}
            while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            status, text = answer(method, path, body)
            payload = text.encode()
            close = headers.get("connection", "").lower() == "close"
            writer.write(
                f"HTTP/1.1 {status} {'OK' if status == 200 else 'Not Found'}\r\n"
                f"Content-Length: {len(payload)}\r\n"
                f"Connection: {'close' if close else 'keep-alive'}\r\n\r\n".encode()
                + payload
            )
            await writer.drain()
            if close:
                break
    except (ConnectionError, ValueError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main():
    status = os.environ.get("TERM_STATUS")
    if status is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: os._exit(int(status)))
    port = int(os.environ.get("PORT", "8080"))
    server = await asyncio.start_server(serve, os.environ.get("BIND", "0.0.0.0"), port)
    print(f"listening on {port}", flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
