//! Dumps whose memory was for the most part written in advance. They need a kernel that tracks which pages are written;
//! `make test-vm` runs them on one.

use std::time::Instant;

use sha2::{Digest, Sha256};

use super::*;
use criu_hooks::engine::{DumpReport, PredumpError, PredumpReport, RestoreOptions};

const PAGE: usize = 4096;

/// The pages that the program keeps changing: 16 MiB of them.
const PAGES: usize = 4096;

/// How often the agent sleeps and wakes.
const GENERATIONS: usize = 8;

/// The pages that it writes in each of its steps.
const WRITES: usize = 16;

/// Fills each page with one number, then writes pages in an order that looks like chance. After each step it looks at
/// every byte, and tells the digest of the pages' numbers, or that a page has more than one. [`Model`] has the numbers
/// alone: an unoptimized test on an emulated machine has no time for the bytes. Huge pages are kept out, because a
/// write to one marks 2 MiB as written. CRIU brings them in all the same when it restores everything from an image
/// without a parent: it fills memory before it applies what was advised. So such an image is restored lazily here.
const WRITER: &str = "import hashlib, itertools, mmap, time
PAGE, PAGES, WRITES = 4096, 4096, 16
memory = mmap.mmap(-1, PAGE * PAGES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory[:] = b''.join((page + 1).to_bytes(8, 'little') * (PAGE // 8) for page in range(PAGES))
for n in itertools.count(1):
    x = n
    for _ in range(WRITES):
        x = (x * 6364136223846793005 + 1442695040888963407) & (2**64 - 1)
        at = (x >> 33) % PAGES * PAGE
        memory[at:at + PAGE] = x.to_bytes(8, 'little') * (PAGE // 8)
    numbers = [memory[at:at + 8] for at in range(0, len(memory), PAGE)]
    torn = [p for p, number in enumerate(numbers) if memory[p * PAGE:(p + 1) * PAGE] != number * (PAGE // 8)]
    print(n, torn or hashlib.sha256(b''.join(numbers)).hexdigest(), flush=True)
    time.sleep(0.2)";

/// What the program's memory must be.
struct Model {
    /// The number in each page.
    pages: Vec<u64>,
    step: u64,
}

/// What a program that tells of its memory step by step must say.
pub(super) trait Expected {
    /// Takes the next line of the program's output, which must be of the next step, and sees to it that every byte is
    /// as it must be.
    fn check(&mut self, line: &str);
}

impl Model {
    fn new() -> Model {
        Model { pages: (1..=PAGES as u64).collect(), step: 0 }
    }
}

impl Expected for Model {
    fn check(&mut self, line: &str) {
        self.step += 1;
        let mut x = self.step;
        for _ in 0..WRITES {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.pages[usize::try_from(x >> 33).unwrap() % PAGES] = x;
        }
        let numbers: Vec<u8> = self.pages.iter().flat_map(|number| number.to_le_bytes()).collect();
        assert_eq!(line, format!("{} {}", self.step, digest(&numbers)));
    }
}

pub(super) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) async fn follow(agent: &mut Agent, model: &mut impl Expected, steps: usize) {
    for _ in 0..steps {
        model.check(&agent.line().await);
    }
}

/// Follows up to a step that was made now: what was told before lies in the pipe and comes at once, and between two steps
/// the program sleeps for longer than that.
pub(super) async fn catch_up(agent: &mut Agent, model: &mut impl Expected) {
    loop {
        let asked = Instant::now();
        let line = agent.line().await;
        let waited = asked.elapsed() > Duration::from_millis(100);
        model.check(&line);
        if waited {
            return;
        }
    }
}

/// A sleep with memory written in advance; the program runs a few steps more in between. `None` where the kernel does
/// not track what is written: then it has slept without.
pub(super) async fn sleep(
    agent: &mut Agent,
    model: &mut impl Expected,
) -> Option<(PredumpReport, DumpReport)> {
    let writer = agent.store.begin(NAMESPACE, &agent.id, None).unwrap();
    let options = DumpOptions::default();
    let ahead = agent.engine.predump(&agent.container, agent.pid, &writer, &options).await;
    let ahead = match ahead {
        Ok(report) => {
            agent.assert_running();
            follow(agent, model, 2).await;
            Some(report)
        }
        Err(why @ PredumpError::NotTracked) => {
            eprintln!("skipped in part: {why}");
            None
        }
        Err(error) => panic!("{error}"),
    };
    let report =
        agent.engine.dump(&agent.container, agent.pid, &writer, &options, &mut NoHooks).await.unwrap();
    let report = agent.slept(report);
    Some((ahead?, report))
}

/// Wakes the agent, lazily or with all of its memory at once; which then is all there. Gives back the bytes that came
/// lazily.
pub(super) async fn wake(agent: &mut Agent, lazily: bool) -> Option<u64> {
    let lazy = lazily.then(super::lazy::lazily);
    let options = RestoreOptions { lazy, ..agent.restore_options() };
    let restored = agent.restore_with(options).await.unwrap();
    assert_eq!(restored.fill.is_ok(), lazily);
    match restored.fill {
        Ok(mut fill) => Some(fill.complete().await.unwrap().bytes),
        Err(_) => None,
    }
}

/// The bytes of memory pages in the image, without its parent's.
pub(super) fn pages(agent: &Agent) -> u64 {
    let image = agent.image();
    let own = |name: &str| name.starts_with("pages-");
    image.manifest().files.iter().filter(|file| own(&file.name)).map(|file| file.size).sum()
}

on_a_node!(incremental_images_hold_every_byte_over_many_generations, async || {
    let args = ["python3", "-c", WRITER];
    let mut agent = Agent::start("writer", &Setup { args: &args, whole_root: true, ..Setup::default() });
    let mut model = Model::new();
    follow(&mut agent, &mut model, 2).await;
    let whole = agent.dump().await.unwrap();
    let whole_pages = pages(&agent);
    wake(&mut agent, true).await;
    for generation in 0..GENERATIONS {
        follow(&mut agent, &mut model, 2).await;
        if let Some((ahead, report)) = sleep(&mut agent, &mut model).await {
            let own = pages(&agent);
            println!(
                "generation {generation}: {} bytes in {:?} ahead; stopped {:?} for {own} bytes of pages, whole: {:?} for {whole_pages}",
                ahead.bytes, ahead.total, report.stopped, whole.stopped
            );
            assert!(ahead.bytes > (PAGE * PAGES) as u64);
            assert_eq!(report.image_bytes, agent.image().bytes());
            assert!(report.image_bytes > ahead.bytes + own);
            // Steps that ran in between have written some, and the interpreter some of its own.
            assert!(own < whole_pages / 4, "{own} of {whole_pages} bytes were written while it stood still");
        }
        let came = wake(&mut agent, generation % 2 == 0).await;
        // Nearly all of it, wherever it is kept.
        assert!(came.is_none_or(|bytes| bytes > (PAGE * PAGES) as u64 * 9 / 10), "{came:?}");
        catch_up(&mut agent, &mut model).await;
        agent.image().remove().unwrap();
    }
    follow(&mut agent, &mut model, 3).await;
    // The whole one's directory, and what is known of the working set.
    let mut left: Vec<_> =
        fs::read_dir("/run/images/test/writer").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["1", "working-set.json"]);
    agent.delete();
});

on_a_node!(an_incremental_image_is_refused_when_a_file_of_its_parent_is_damaged, async || {
    let args = ["python3", "-c", WRITER];
    let mut agent = Agent::start("writer", &Setup { args: &args, whole_root: true, ..Setup::default() });
    let mut model = Model::new();
    follow(&mut agent, &mut model, 1).await;
    if sleep(&mut agent, &mut model).await.is_none() {
        agent.delete();
        return;
    }
    let image = agent.image();
    let parent = image.path().join("parent");
    let names: Vec<_> = fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.len() > 2, "{names:?}");
    for name in &names {
        let named = format!("parent/{}", name.to_str().unwrap());
        let away = image.path().join("away");
        fs::rename(parent.join(name), &away).unwrap();
        match agent.restore().await.unwrap_err() {
            RestoreError::Image(image::Error::Missing { file, .. }) => assert_eq!(file, named),
            other => panic!("{named}: {other}"),
        }
        let whole = fs::read(&away).unwrap();
        fs::write(parent.join(name), &whole[..whole.len() / 2]).unwrap();
        match agent.restore().await.unwrap_err() {
            RestoreError::Image(image::Error::Truncated { file, .. }) => assert_eq!(file, named),
            other => panic!("{named}: {other}"),
        }
        fs::rename(&away, parent.join(name)).unwrap();
    }
    // A byte of a page that was written in advance.
    assert!(image.finish_in_background(None).unwrap().await.unwrap().summed);
    let pages = parent.join("pages-1.img");
    let whole = fs::read(&pages).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    fs::write(&pages, flipped).unwrap();
    match agent.restore().await.unwrap_err() {
        RestoreError::Image(image::Error::PageAltered { file, .. }) => assert_eq!(file, "parent/pages-1.img"),
        other => panic!("{other}"),
    }
    fs::write(&pages, whole).unwrap();
    let link = image.path().join("img/parent");
    fs::remove_file(&link).unwrap();
    assert!(matches!(agent.restore().await, Err(RestoreError::Image(image::Error::Missing { .. }))));
    std::os::unix::fs::symlink("../work", &link).unwrap();
    assert!(matches!(agent.restore().await, Err(RestoreError::Image(image::Error::Altered { .. }))));
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("../parent", &link).unwrap();
    agent.restore().await.unwrap();
    follow(&mut agent, &mut model, 2).await;
    agent.delete();
});

on_a_node!(a_dump_given_up_after_writing_in_advance_leaves_the_agent_and_no_trace, async || {
    let mut agent = Agent::start("counter", &Setup::default());
    let last = agent.count_on(0, 5).await;
    let writer = agent.store.begin(NAMESPACE, "counter", None).unwrap();
    let options = DumpOptions::default();
    match agent.engine.predump(&agent.container, agent.pid, &writer, &options).await {
        Err(PredumpError::NotTracked) => eprintln!("skipped in part: {}", PredumpError::NotTracked),
        other => drop(other.unwrap()),
    }
    let vetoed = agent.engine.dump(&agent.container, agent.pid, &writer, &options, &mut Veto).await;
    assert!(matches!(vetoed, Err(DumpError::Vetoed(_))));
    drop(writer);
    assert_eq!(fs::read_dir("/run/images/test/counter").unwrap().count(), 0);
    agent.assert_running();
    let last = agent.count_on(last, 10).await;
    // What the tracking of the first left in the kernel means nothing to the next.
    agent.dump().await.unwrap();
    agent.restore().await.unwrap();
    agent.count_on(last, 10).await;
    agent.delete();
});
