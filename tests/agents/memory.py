#!/usr/bin/python3
"""Memory of every kind, filled with a pattern that is known to the last byte, and verified on demand.

MEMORY_MIB   how much of it, in MiB (16); at least 8
SEED         makes the pattern (1)
PORT, BIND   where it listens (8080 on 0.0.0.0); PORT=0 for nowhere

GET /health    200
GET /verify    200 with what was verified, 500 with what is wrong: every byte of every region is compared
GET /regions   one line a region: name, address, length
POST /write    rewrites as many pages at random as the body says
POST /writer   rewrites as many pages a second as the body says, from now on; 0 to stop
POST /move     mremap: half of the region "moved" goes to another address
POST /unmap    munmap: the region "unmapped" loses its second half
POST /drop     MADV_DONTNEED: half of the region "dropped" must read as zero
POST /fork     a child verifies everything, writes on its own copy, verifies again and ends; 500 when it found a fault

SIGUSR1 verifies too, for callers without a network: a line on stdout begins with "verified" or with "WRONG".
"""

import asyncio
import ctypes
import mmap
import os
import random
import signal
import struct
import threading

PAGE = 4096
MIB = 1 << 20
HUGE = 2 * MIB
PAGES_A_MIB = MIB // PAGE
ZERO = bytes(PAGE)

# From <linux/mman.h>; the module mmap lacks them.
MREMAP_MAYMOVE, MREMAP_FIXED, MADV_HUGEPAGE, MADV_DONTNEED = 1, 2, 14, 4

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.pthread_self.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.malloc.argtypes = [ctypes.c_size_t]
libc.sbrk.argtypes = [ctypes.c_ssize_t]

seed = int(os.environ.get("SEED", "1"))
chance = random.Random(seed)
# No two places of it are alike, and it cannot be compressed.
noise = chance.randbytes(MIB + PAGE)


def succeeded(result, what):
    if result in (None, -1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def anonymous(length, flags=mmap.MAP_PRIVATE, protection=mmap.PROT_READ | mmap.PROT_WRITE):
    return succeeded(libc.mmap(None, length, protection, flags | mmap.MAP_ANONYMOUS, -1, 0), "mmap")


def mapped(fd, length, flags):
    return succeeded(libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0), "mmap")


class Region:
    """Pages from one address on. A page's version says what it must hold; None is a page that reads as zero."""

    def __init__(self, name, address, length, version=0, fill=True, writable=True, fd=None):
        self.name, self.address, self.writable, self.fd = name, address, writable, fd
        self.tag = chance.getrandbits(63)
        self.versions = [version] * (length // PAGE)
        if fill:
            self.fill(range(len(self.versions)))

    def content(self, page):
        """What a page must hold: its region, its number, its version, and noise from a place of its own."""
        version = self.versions[page]
        if version is None:
            return ZERO
        place = ((page * 2654435761 + self.tag + version * 40503) >> 4) % MIB
        return struct.pack("<QQQ", self.tag, page, version) + noise[place : place + PAGE - 24]

    def fill(self, pages):
        for page in pages:
            ctypes.memmove(self.address + page * PAGE, self.content(page), PAGE)

    def write(self, page):
        """Gives a page another version. Untouched pages stay so."""
        if self.versions[page] is not None:
            self.versions[page] += 1
            self.fill([page])

    def faults(self):
        """The pages that do not hold what they must, in memory or in the file behind it."""
        for page in range(len(self.versions)):
            expected = self.content(page)
            if ctypes.string_at(self.address + page * PAGE, PAGE) != expected:
                found = ctypes.string_at(self.address + page * PAGE, PAGE)
                at = next(at for at in range(PAGE) if found[at] != expected[at])
                kind = "zero" if found == ZERO else f"byte {at} is {found[at]}, not {expected[at]}"
                yield f"{self.name}: page {page} at {self.address + page * PAGE:#x}: {kind}"
            elif self.fd is not None and os.pread(self.fd, PAGE, page * PAGE) != expected:
                yield f"{self.name}: page {page} differs in its file"


def file_of(folder, name, length):
    os.makedirs(folder, exist_ok=True)
    fd = os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(fd, length)
    return fd


def private_file(length):
    """A file mapped privately: its even pages are read from it, its odd pages are copies that only memory has."""
    fd = file_of("/var/tmp/memory", "private", length)
    region = Region("file-private", mapped(fd, length, mmap.MAP_SHARED), length)
    libc.munmap(region.address, length)
    region.address = mapped(fd, length, mmap.MAP_PRIVATE)
    for page in range(1, length // PAGE, 2):
        region.write(page)
    os.close(fd)
    return region


def shared_file(name, folder, length):
    fd = file_of(folder, "shared", length)
    return Region(name, mapped(fd, length, mmap.MAP_SHARED), length, fd=fd)


def sparse(length):
    """Of every three pages one is never touched, and so is all of every other MiB."""
    region = Region("sparse", anonymous(length), length, fill=False)
    for page in range(length // PAGE):
        if page % 3 == 2 or page // PAGES_A_MIB % 2:
            region.versions[page] = None
        else:
            region.fill([page])
    return region


def read_only(length):
    region = Region("read-only", anonymous(length), length, writable=False)
    succeeded(libc.mprotect(region.address, length, mmap.PROT_READ), "mprotect")
    return region


def huge(length):
    """Aligned to huge pages, and wanted as such."""
    start = anonymous(length + HUGE)
    aligned = (start + HUGE - 1) // HUGE * HUGE
    libc.madvise(aligned, length, MADV_HUGEPAGE)
    return Region("huge", aligned, length)


def heap(length):
    """From malloc, in pieces that are too small for a mapping of their own."""
    piece = 64 * 1024
    for number in range(length // piece):
        start = succeeded(libc.malloc(piece + PAGE), "malloc")
        yield Region(f"heap-{number}", (start + PAGE - 1) // PAGE * PAGE, piece)


def brk(length):
    start = succeeded(libc.sbrk(length + PAGE), "sbrk")
    return Region("brk", (start + PAGE - 1) // PAGE * PAGE, length)


def main_stack(length):
    """Far below what the interpreter uses of the first thread's stack."""
    with open("/proc/self/maps") as maps:
        line = next(line for line in maps if line.rstrip().endswith("[stack]"))
    end = int(line.split()[0].split("-")[1], 16)
    return Region("stack", end - 3 * MIB - length, length)


def thread_stack(length):
    """The far end of the stack of a thread that waits for ever."""
    known = threading.Event()
    lowest = ctypes.c_void_p()

    def wait():
        attributes = (ctypes.c_char * 64)()
        libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes)
        libc.pthread_attr_getstack(attributes, ctypes.byref(lowest), ctypes.byref(ctypes.c_size_t()))
        known.set()
        threading.Event().wait()

    threading.stack_size(length + 2 * MIB)
    threading.Thread(target=wait, daemon=True).start()
    threading.stack_size(0)
    known.wait()
    # Past a guard that may be a part of it.
    return Region("thread-stack", lowest.value + 64 * 1024, length)


def all_regions(mib):
    """Shares of the whole; what is behind files and in /dev/shm is kept small, as containers have it."""
    share = max(mib // 32, 1) * MIB
    small = min(share, 16 * MIB) // 2
    regions = [
        sparse(4 * share),
        Region("shared", anonymous(share, mmap.MAP_SHARED), share),
        private_file(small),
        shared_file("file-shared", "/var/tmp/memory", small),
        shared_file("shm", "/dev/shm/memory", small),
        *heap(share),
        brk(share),
        main_stack(MIB // 2),
        thread_stack(MIB // 2),
        huge(max(share, HUGE) // HUGE * HUGE),
        read_only(small),
        Region("zero", anonymous(share), share, version=None),
        Region("untouched", anonymous(share), share, version=None, fill=False),
        Region("moved", anonymous(small), small),
        Region("unmapped", anonymous(small), small),
        Region("dropped", anonymous(small), small),
    ]
    memfd = os.memfd_create("memory")
    os.ftruncate(memfd, small)
    regions.append(Region("memfd", mapped(memfd, small, mmap.MAP_SHARED), small, fd=memfd))
    touched = sum(len(region.versions) - region.versions.count(None) for region in regions)
    rest = max(mib * MIB - touched * PAGE, MIB) // PAGE * PAGE
    regions.append(Region("private", anonymous(rest), rest))
    return regions


def verify():
    faults = [fault for region in regions for fault in region.faults()]
    pages = sum(len(region.versions) for region in regions)
    if faults:
        return False, f"WRONG {len(faults)} of {pages} pages: " + "; ".join(faults[:20])
    return True, f"verified {pages * PAGE} bytes in {len(regions)} regions"


def write(count):
    writable = [region for region in regions if region.writable]
    sizes = [len(region.versions) for region in writable]
    for region in random.choices(writable, sizes, k=count):
        region.write(random.randrange(len(region.versions)))


def region(name):
    return next(region for region in regions if region.name == name)


def move():
    moved = region("moved")
    old = moved.address
    half = len(moved.versions) // 2 * PAGE
    target = anonymous(2 * half)
    for offset in (0, half):
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        # In two steps, so that the first leaves half of what was one area behind.
        succeeded(libc.mremap(old + offset, half, half, flags, target + offset), "mremap")
    moved.address = target


def unmap():
    unmapped = region("unmapped")
    kept = max(len(unmapped.versions) // 2, 1)
    lost = len(unmapped.versions) - kept
    if lost:
        succeeded(libc.munmap(unmapped.address + kept * PAGE, lost * PAGE), "munmap")
        del unmapped.versions[kept:]


def drop():
    dropped = region("dropped")
    count = len(dropped.versions) // 2
    succeeded(libc.madvise(dropped.address, count * PAGE, MADV_DONTNEED), "madvise")
    dropped.versions[:count] = [None] * count


def fork():
    """The parent goes on meanwhile and verifies too: copies on write are what goes wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status, said = 1, "the child failed"
        try:
            whole, said = verify()
            if whole:
                for region in regions:
                    if region.writable and region.name in ("private", "brk", "sparse", "huge", "zero"):
                        for page in range(0, len(region.versions), 5):
                            region.write(page)
                whole, said = verify()
            status = 0 if whole else 1
        finally:
            os.write(writing, said.encode()[:2048])
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if status != 0:
        return False, f"in the child: {said or f'status {status}'}"
    return verify()


rate = 0


async def write_on():
    while True:
        await asyncio.sleep(0.01)
        write(rate // 100)


def answer(method, path, body):
    global rate
    match method, path:
        case "GET", "/health":
            return True, "ok"
        case "GET", "/verify":
            return verify()
        case "GET", "/regions":
            return True, "".join(f"{r.name} {r.address:#x} {len(r.versions) * PAGE}\n" for r in regions)
        case "POST", "/write":
            return True, str(write(int(body)))
        case "POST", "/writer":
            rate = int(body)
            return True, body.decode()
        case "POST", ("/move" | "/unmap" | "/drop") as what:
            {"/move": move, "/unmap": unmap, "/drop": drop}[what]()
            return verify()
        case "POST", "/fork":
            return fork()
        case _:
            return None, "no such thing"


async def serve(reader, writer):
    try:
        while line := await reader.readline():
            method, path, _ = line.decode("latin-1").split(" ", 2)
            length = 0
            while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
                name, _, value = line.decode("latin-1").partition(":")
                if name.strip().lower() == "content-length":
                    length = int(value)
            good, text = answer(method, path, await reader.readexactly(length))
            status = {True: "200 OK", False: "500 Wrong", None: "404 Not Found"}[good]
            payload = text.encode()
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + payload)
            await writer.drain()
            break
    except (ConnectionError, ValueError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: print(verify()[1], flush=True))
    port = int(os.environ.get("PORT", "8080"))
    writing = loop.create_task(write_on())
    if port:
        await asyncio.start_server(serve, os.environ.get("BIND", "0.0.0.0"), port)
    print(f"filled {sum(len(region.versions) for region in regions) * PAGE} bytes", flush=True)
    await writing


regions = all_regions(int(os.environ.get("MEMORY_MIB", "16")))
asyncio.run(main())
