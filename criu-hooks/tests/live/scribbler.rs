//! Dumps whose memory was written in advance, of a program that changes the map of its memory between them. They need a
//! kernel that tracks which pages are written; `make test-vm` runs them on one.

use super::incremental::{Expected, catch_up, digest, follow, pages, sleep, wake};
use super::*;

const GENERATIONS: usize = 20;

/// The most pages that the program holds.
const MOST: usize = 1024;

/// How many changes it makes in each of its steps, and in how many steps a child lives.
const CHANGES: usize = 12;
const LIFE: usize = 8;

/// Changes its memory in ways that look like chance: it writes pages, maps areas and unmaps them, makes them larger and
/// smaller (which may move them), and drops pages. Now and then it forks; the child writes to some pages, and tells at
/// its end what it holds. Each page has one number all over, or is told to be torn. [`Scribbles`] does the same.
const SCRIBBLER: &str = "import hashlib, itertools, mmap, os, time
PAGE, MOST, CHANGES, LIFE = 4096, 1024, 12, 8
state, areas, child = 1, [], None
def chance(below):
    global state
    state = (state * 6364136223846793005 + 1442695040888963407) & (2**64 - 1)
    return (state >> 33) % below
def size(area):
    return len(area) // PAGE
def fill(area, page, number):
    area[page * PAGE:(page + 1) * PAGE] = number.to_bytes(8, 'little') * (PAGE // 8)
def change():
    what, which = chance(16), chance(len(areas)) if areas else 0
    room = MOST - sum(map(size, areas))
    if not areas or what < 2:
        pages = 1 + chance(128)
        if pages <= room:
            areas.append(mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            areas[-1].madvise(mmap.MADV_NOHUGEPAGE)
    elif what == 2:
        areas.pop(which).close()
    elif what == 3:
        pages = 1 + chance(192)
        if pages <= room + size(areas[which]):
            areas[which].resize(pages * PAGE)
    elif what == 4:
        first = chance(size(areas[which]))
        pages = 1 + chance(size(areas[which]) - first)
        areas[which].madvise(mmap.MADV_DONTNEED, first * PAGE, pages * PAGE)
    elif what == 5:
        first = chance(size(areas[which]))
        for page in range(first, min(first + 32, size(areas[which]))):
            fill(areas[which], page, state + page & (2**64 - 1))
    else:
        fill(areas[which], chance(size(areas[which])), state)
def look():
    numbers = []
    for number, area in enumerate(areas):
        for page in range(size(area)):
            held = area[page * PAGE:(page + 1) * PAGE]
            if held != held[:8] * (PAGE // 8):
                return f'torn: page {page} of {number}'
            numbers.append(held[:8])
    return hashlib.sha256(b''.join(numbers)).hexdigest()
def born():
    to_child, to_parent = os.pipe(), os.pipe()
    if pid := os.fork():
        return pid, to_child[1], to_parent[0]
    for number, area in enumerate(areas):
        fill(area, 0, number)
    os.read(to_child[0], 1)
    os.write(to_parent[1], look().encode())
    os._exit(0)
def ended(pid, ask, answer):
    os.write(ask, b'?')
    told = os.read(answer, 4096).decode()
    os.waitpid(pid, 0)
    return told
for n in itertools.count(1):
    for _ in range(CHANGES):
        change()
    told = '-'
    if n % LIFE == 0:
        told = ended(*child) if child else '-'
        child = born()
    print(n, look(), told, flush=True)
    time.sleep(0.2)";

/// What the program's memory must be: the number in each page of each area.
#[derive(Default)]
struct Scribbles {
    state: u64,
    step: usize,
    areas: Vec<Vec<u64>>,
    child: Option<Vec<Vec<u64>>>,
}

impl Scribbles {
    fn chance(&mut self, below: usize) -> usize {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.state >> 33).unwrap() % below
    }

    fn change(&mut self) {
        let what = self.chance(16);
        let which = if self.areas.is_empty() { 0 } else { self.chance(self.areas.len()) };
        let room = MOST - self.areas.iter().map(Vec::len).sum::<usize>();
        let size = self.areas.get(which).map_or(0, Vec::len);
        match what {
            _ if self.areas.is_empty() || what < 2 => {
                let pages = 1 + self.chance(128);
                if pages <= room {
                    self.areas.push(vec![0; pages]);
                }
            }
            2 => drop(self.areas.remove(which)),
            3 => {
                let pages = 1 + self.chance(192);
                if pages <= room + size {
                    self.areas[which].resize(pages, 0);
                }
            }
            4 => {
                let first = self.chance(size);
                let pages = 1 + self.chance(size - first);
                self.areas[which][first..first + pages].fill(0);
            }
            5 => {
                let first = self.chance(size);
                for page in first..size.min(first + 32) {
                    self.areas[which][page] = self.state.wrapping_add(page as u64);
                }
            }
            _ => {
                let page = self.chance(size);
                self.areas[which][page] = self.state;
            }
        }
    }
}

fn look(areas: &[Vec<u64>]) -> String {
    let numbers: Vec<u8> = areas.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
    digest(&numbers)
}

impl Expected for Scribbles {
    fn check(&mut self, line: &str) {
        self.step += 1;
        for _ in 0..CHANGES {
            self.change();
        }
        let mut told = "-".to_owned();
        if self.step.is_multiple_of(LIFE) {
            told = self.child.take().map_or(told, |child| look(&child));
            let mut child = self.areas.clone();
            for (number, area) in (0..).zip(&mut child) {
                area[0] = number;
            }
            self.child = Some(child);
        }
        assert_eq!(line, format!("{} {} {told}", self.step, look(&self.areas)));
    }
}

on_a_node!(incremental_images_of_a_program_that_maps_moves_drops_and_forks_hold_every_byte, async || {
    let args = ["python3", "-c", SCRIBBLER];
    let mut agent = Agent::start("scribbler", &Setup { args: &args, whole_root: true, ..Setup::default() });
    let mut model = Scribbles { state: 1, ..Scribbles::default() };
    follow(&mut agent, &mut model, LIFE + 1).await;
    for generation in 1..=GENERATIONS {
        if let Some((ahead, report)) = sleep(&mut agent, &mut model).await {
            println!(
                "generation {generation}: {} bytes written in advance, {} bytes of pages while it stood still, {} in all",
                ahead.bytes,
                pages(&agent),
                report.image_bytes
            );
        }
        wake(&mut agent, generation % 2 == 0).await;
        catch_up(&mut agent, &mut model).await;
        agent.image().remove().unwrap();
    }
    assert!(model.step > LIFE * 2, "{} steps", model.step);
    agent.delete();
});
