"""Servers of several kinds, for clients that come while the agent sleeps. The first argument names the kind.

Each prints "ready" when it listens on PORT (or above), and on SIGUSR1 what its listeners are like.
"""

import os
import signal
import socket
import sys
import threading

PORT = int(os.environ.get("PORT", "8080"))
listeners = []


def listen(address, port=PORT, backlog=16, **options):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, options.get("reuse", 1))
    if options.get("group"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, options.get("only", 0))
    listener.bind((address, port))
    listener.listen(backlog)
    listeners.append(listener)
    return listener


def talk(connection, name):
    """Speaks first, then answers each line; closes the connection after "bye"."""
    try:
        with connection, connection.makefile("rwb") as lines:
            lines.write(f"220 {name}\n".encode())
            lines.flush()
            for line in lines:
                lines.write(f"{name}: ".encode() + line)
                lines.flush()
                if line == b"bye\n":
                    break
    except OSError:
        pass


def serve(listener, name):
    """Blocks in accept."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=talk, args=(connection, name), daemon=True).start()


def poll():
    """One epoll for all listeners, each ready event told once (edge-triggered)."""
    import select

    poller = select.epoll()
    for listener in listeners:
        listener.setblocking(False)
        poller.register(listener, select.EPOLLIN | select.EPOLLET)
    numbers = {listener.fileno(): number for number, listener in enumerate(listeners)}
    while True:
        for descriptor, _ in poller.poll():
            number = numbers[descriptor]
            while True:
                try:
                    connection, _ = listeners[number].accept()
                except BlockingIOError:
                    break
                connection.setblocking(True)
                threading.Thread(target=talk, args=(connection, f"door {number}"), daemon=True).start()


def udp(address, owner=0, together=False):
    UDP_GRO = 104
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_UDP, UDP_GRO, together)
    server.bind((address, PORT))
    os.fchown(server.fileno(), owner, owner)
    print("ready", flush=True)
    while True:
        data, sender = server.recvfrom(65536)
        answer = str(os.fstat(server.fileno()).st_uid).encode() if data == b"owner" else b"echo: " + data
        server.sendto(answer, sender)


def describe(*_):
    for listener in listeners:
        option = lambda name: listener.getsockopt(socket.SOL_SOCKET, name)
        # struct tcp_info of a listener: the length of its queue is the seventh number of 32 bits.
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
        backlog = int.from_bytes(info[28:32], sys.byteorder)
        owner = os.fstat(listener.fileno()).st_uid
        print(
            f"reuseport={option(socket.SO_REUSEPORT)} reuseaddr={option(socket.SO_REUSEADDR)} "
            f"backlog={backlog} owner={owner}",
            flush=True,
        )


def main(kind):
    signal.signal(signal.SIGUSR1, describe)
    match kind:
        case "blocking":
            server = listen("0.0.0.0")
            print("ready", flush=True)
            threading.Thread(target=serve, args=(server, "blocking"), daemon=True).start()
            while True:
                signal.pause()
        case "strict":
            # Its ports are taken as long as anything of a connection is left.
            listen("0.0.0.0", reuse=0)
            listen("::1", reuse=0)
            print("ready", flush=True)
            poll()
        case "several":
            # Two ports, one of them on the loopback device only, both families.
            for address, port in [("0.0.0.0", PORT), ("127.0.0.1", PORT + 1), ("::", PORT + 2), ("::1", PORT + 3)]:
                listen(address, port)
            print("ready", flush=True)
            poll()
        case "group":
            for _ in range(4):
                listen("0.0.0.0", group=True)
            print("ready", flush=True)
            poll()
        case "forked":
            server = listen("0.0.0.0")
            workers = [pid for number in range(4) if (pid := worker(server, number))]
            print("ready", flush=True)
            for pid in workers:
                os.waitpid(pid, 0)
        case "owned":
            os.fchown(listen("0.0.0.0", backlog=7).fileno(), 1234, 1234)
            print("ready", flush=True)
            poll()
        case "abstract":
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.bind("\0door")
            server.listen(16)
            if os.fork() == 0:
                # A client of its own, which stays connected.
                inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                inner.connect("\0door")
                lines = inner.makefile("rwb")
                print("inner", lines.readline().decode().strip(), flush=True)

                def ping(*_):
                    lines.write(b"ping\n")
                    lines.flush()
                    print("inner", lines.readline().decode().strip(), flush=True)

                signal.signal(signal.SIGUSR2, ping)
                while True:
                    signal.pause()
            print("ready", flush=True)
            serve(server, "abstract")
        case "path":
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.bind(sys.argv[2])
            server.listen(16)
            print("ready", flush=True)
            serve(server, "path")
        case "udp":
            udp("0.0.0.0")
        case "udp-owned":
            udp("0.0.0.0", owner=1234)
        case "udp-together":
            # The kernel may put datagrams together, as servers of QUIC want it.
            udp("0.0.0.0", together=True)
        case "udp6":
            udp("::")


def worker(server, number):
    pid = os.fork()
    if pid == 0:
        serve(server, f"worker {number}")
    return pid


main(sys.argv[1])
