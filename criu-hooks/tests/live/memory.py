"""Fills memory with seeded patterns, and verifies each byte of it over and over: one line of output a round.

Arguments: the size in MiB, then what else to do in each round: threads, tasks, fork, advise, unmap, remap, shared, file.
"""
import ctypes, hashlib, mmap, os, random, sys, threading, time

MIB = 1 << 20
PAGE = mmap.PAGESIZE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
ZEROS = bytes(MIB)


def pattern(seed, length=MIB):
    return random.Random(seed).randbytes(length)


def wrong(what, at):
    print(f"WRONG {what} at {at:#x}", flush=True)
    os._exit(3)


def check(area, offset, expected, what):
    if memoryview(area)[offset : offset + len(expected)] != expected:
        found = bytes(area[offset : offset + len(expected)])
        first = next(i for i, (a, b) in enumerate(zip(found, expected)) if a != b)
        wrong(f"{what}: {found[first]} instead of {expected[first]}", offset + first)


class Area:
    """A mapping whose every MiB has a pattern of its own."""

    def __init__(self, mib, seed, memory=None):
        self.seed, self.mib = seed, mib
        self.memory = memory or mmap.mmap(-1, mib * MIB, flags=PRIVATE)
        for index in range(mib):
            self.memory[index * MIB : (index + 1) * MIB] = pattern((seed << 20) + index)

    def verify(self, indices=None):
        for index in indices or range(self.mib):
            check(self.memory, index * MIB, pattern((self.seed << 20) + index), f"area {self.seed}")


def digests(area):
    return [hashlib.sha1(memoryview(area.memory)[i * MIB : (i + 1) * MIB]).digest() for i in range(area.mib)]


def in_threads(area, expected):
    """Four threads at once, which do not wait for each other: hashing lets go of the interpreter's lock."""
    def verify(first):
        for i in range(first, area.mib, 4):
            if hashlib.sha1(memoryview(area.memory)[i * MIB : (i + 1) * MIB]).digest() != expected[i]:
                wrong("a thread's part", i * MIB)

    threads = [threading.Thread(target=verify, args=(first,)) for first in range(min(4, area.mib))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


def forked(area):
    child = os.fork()
    if child == 0:
        area.verify(random.sample(range(area.mib), min(2, area.mib)))
        os._exit(0)
    return child


def awaited(child):
    status = os.waitpid(child, 0)[1]
    if status != 0:
        wrong(f"a forked child, which ended with status {status:#x},", 0)


def advise(area):
    """Gives a part back to the kernel: from then on it is zeros, and may be written again."""
    index = random.randrange(area.mib)
    first = random.randrange(0, MIB // PAGE - 1)
    pages = random.randrange(1, MIB // PAGE - first)
    start = index * MIB + first * PAGE
    area.memory.madvise(mmap.MADV_DONTNEED, start, pages * PAGE)
    check(area.memory, start, ZEROS[: pages * PAGE], "given back")
    area.memory[index * MIB : (index + 1) * MIB] = pattern((area.seed << 20) + index)


def unmap(areas):
    """Unmaps an area and maps another, most often at the same address."""
    old = areas.pop(0)
    mib, seed = old.mib, old.seed
    old.memory.close()
    fresh = mmap.mmap(-1, mib * MIB, flags=PRIVATE)
    check(fresh, random.randrange(mib) * MIB, ZEROS, "mapped anew")
    areas.append(Area(mib, seed + 1, fresh))


def remap(area, libc=ctypes.CDLL(None, use_errno=True)):
    """Moves a part of an area away and back: MREMAP_MAYMOVE | MREMAP_FIXED."""
    libc.mremap.restype = libc.mmap.restype = ctypes.c_void_p
    address = ctypes.addressof(ctypes.c_char.from_buffer(area.memory))
    index = random.randrange(area.mib)
    there = libc.mmap(None, ctypes.c_size_t(MIB), 3, PRIVATE, -1, ctypes.c_size_t(0))
    here = address + index * MIB
    size = ctypes.c_size_t(MIB)
    if libc.mremap(ctypes.c_void_p(here), size, size, 3, ctypes.c_void_p(there)) != there:
        wrong("mremap", index)
    moved = (ctypes.c_char * MIB).from_address(there)
    if bytes(moved) != pattern((area.seed << 20) + index):
        wrong("moved", index * MIB)
    if libc.mremap(ctypes.c_void_p(there), size, size, 3, ctypes.c_void_p(here)) != here:
        wrong("mremap back", index)


def main():
    mib, extras = int(sys.argv[1]), set(sys.argv[2:])
    first = os.getpid() == 1
    if "tasks" in extras:
        # Children that verify memory of their own and what they share with their parent since the fork.
        common = Area(max(1, mib // 4), 1000)
        for number in range(3):
            if os.fork() == 0:
                extras, mib, first = extras - {"tasks"}, max(1, mib // 4), False
                random.seed(number)
                break
    area = Area(mib, 2 if first else 500 + os.getpid())
    untouched = mmap.mmap(-1, 8 * MIB, flags=PRIVATE)
    zeros = mmap.mmap(-1, 4 * MIB, flags=PRIVATE)
    zeros[:] = bytes(4 * MIB)
    spare = [Area(2, 20), Area(2, 30)]
    others = []
    if "shared" in extras:
        others.append(Area(4, 40, mmap.mmap(-1, 4 * MIB)))
    if "file" in extras:
        with open(f"/tmp/mapped-{os.getpid()}", "w+b") as file:
            file.truncate(4 * MIB)
            others.append(Area(4, 50, mmap.mmap(file.fileno(), 4 * MIB)))
            others.append(Area(4, 60, mmap.mmap(file.fileno(), 4 * MIB, flags=mmap.MAP_PRIVATE)))
    expected = digests(area)
    number = 0
    while True:
        number += 1
        child = forked(area) if "fork" in extras else None
        if "advise" in extras:
            advise(random.choice([area, *spare]))
        if "unmap" in extras:
            unmap(spare)
        if "remap" in extras:
            remap(area)
        if "threads" in extras:
            in_threads(area, expected)
        some = random.sample(range(mib), min(mib, 4)) if "brief" in extras else None
        area.verify(some)
        for other in [*spare, *others]:
            other.verify()
        check(untouched, random.randrange(8) * MIB, ZEROS, "untouched")
        check(zeros, random.randrange(4) * MIB, ZEROS, "zeros")
        if child is not None:
            awaited(child)
        if "tasks" in sys.argv:
            common.verify()
            if first and os.waitpid(-1, os.WNOHANG)[0]:
                wrong("a task", 0)
        if first:
            print(number, flush=True)
        time.sleep(0.005)


main()
