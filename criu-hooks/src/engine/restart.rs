//! System calls that sleep, and go on sleeping after a restore.
//!
//! A thread that is dumped in `nanosleep`, `poll` or a timed `futex` would be restored with that call ended early, by
//! EINTR: CRIU cannot carry over how the kernel meant to restart it, and says so in its log ("Will restore N with
//! interrupted system call"). Programs that do not expect that, as busybox's `sleep`, would end. So the registers in the
//! image are set to make the call again: for what is left of the time, where the kernel has noted that for the caller,
//! and from the beginning where it has not.
//!
//! When the time asleep counts, [`elapsed`] sets them once more at the restore, to what is left by then.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::BorrowedFd,
    time::Duration,
};

use rustix::fs::{Mode, OFlags};

use super::message::{self, Message};
use crate::waits::{
    TimedWait,
    calls::{Call, RESTART},
};

/// The longest log that is searched, and the longest image of a thread that is changed, in bytes.
const MAX: u64 = 64 << 20;
/// The second word of the image of a thread.
pub(super) const CORE: u32 = 0x5505_3847;
/// The fields of an image of a thread: its part for x86, and in that its registers.
const X86: u32 = 2;
const REGISTERS: u32 = 2;
/// The part that every thread has, and in that how its system calls are filtered.
const THREAD: u32 = 5;
const SECCOMP: u32 = 11;

/// Registers by their fields in the image.
mod field {
    pub const R10: u32 = 8;
    pub const AX: u32 = 11;
    pub const DX: u32 = 13;
    pub const SI: u32 = 14;
    pub const DI: u32 = 15;
    pub const ORIG_AX: u32 = 16;
    pub const IP: u32 = 17;
    pub const CS: u32 = 18;
    pub const SP: u32 = 20;
}

/// System calls of x86-64.
mod call {
    pub const POLL: u64 = 7;
    pub const NANOSLEEP: u64 = 35;
    pub const FUTEX: u64 = 202;
    pub const CLOCK_NANOSLEEP: u64 = 230;
}

/// The code segment of 64-bit programs: the calls of others have other numbers.
const CODE_64_BIT: u64 = 0x33;
/// -EINTR and -ETIMEDOUT.
const INTERRUPTED: u64 = 4_u64.wrapping_neg();
const TIMED_OUT: u64 = 110_u64.wrapping_neg();
/// What a futex is asked for, without flags: to wait for so long.
const FUTEX_COMMAND: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;
/// The length of the instruction `syscall`.
const SYSCALL: u64 = 2;

/// Lets the calls go on that `log` names as interrupted, in the images of a dump whose processes still stand still.
/// `waits` knows the calls that had been interrupted before, which the kernel has under another number since. Returns
/// how many.
pub(super) fn let_calls_go_on(
    images: BorrowedFd<'_>,
    work: BorrowedFd<'_>,
    log: &str,
    waits: &[TimedWait],
) -> io::Result<usize> {
    let log = read(&open(work, log, OFlags::RDONLY)?)?;
    let mut changed = 0;
    for thread in interrupted(&String::from_utf8_lossy(&log)) {
        let Some(inside) = id_inside(thread) else { continue };
        let file = open(images, &format!("core-{inside}.img"), OFlags::RDWR)?;
        let wait = waits.iter().find(|wait| wait.thread.as_raw_nonzero().get().cast_unsigned() == thread);
        let Some(image) = restarted(&read(&file)?, wait.map(|wait| &wait.call)) else { continue };
        replace(&file, &image)?;
        changed += 1;
    }
    Ok(changed)
}

/// Where the stacks of the threads end whose images are in `images`; none when an image is not as known.
pub(super) fn stacks(images: BorrowedFd<'_>, names: &[String]) -> io::Result<Option<Vec<u64>>> {
    let threads = names.iter().filter(|name| name.starts_with("core-"));
    let stack = |name: &String| Ok(stack_of(&read(&open(images, name, OFlags::RDONLY)?)?));
    threads.map(stack).collect()
}

/// The stack pointer in the image of a thread.
fn stack_of(image: &[u8]) -> Option<u64> {
    let core = Message::parse(message::records(image, CORE)?.first()?)?;
    core.parts(X86).find_map(|x86| x86.parts(REGISTERS).find_map(|registers| registers.number(field::SP)))
}

/// The threads whose calls were interrupted, by their ids here.
fn interrupted(log: &str) -> impl Iterator<Item = u32> {
    log.lines().filter_map(|line| {
        let (_, rest) = line.split_once("Will restore ")?;
        rest.strip_suffix(" with interrupted system call")?.parse().ok()
    })
}

/// A thread's id in the innermost PID namespace that it is in: the one that its image is named by.
pub(super) fn id_inside(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    ids.split_whitespace().next_back()?.parse().ok()
}

pub(super) fn open(directory: BorrowedFd<'_>, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?.into())
}

pub(super) fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // A part of it may look whole.
    if file.take(MAX + 1).read_to_end(&mut bytes)? as u64 > MAX {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {} MiB", MAX >> 20),
        ));
    }
    Ok(bytes)
}

/// Replaces a file's contents. When that fails the dump must: half an image is none.
pub(super) fn replace(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
    file.set_len(0)?;
    file.write_all(bytes)
}

/// The image of a thread with its interrupted call to be made again; none when there is no such call, or the image is
/// not as known. `known` is the call, should it have been interrupted before.
fn restarted(image: &[u8], known: Option<&Call>) -> Option<Vec<u8>> {
    let restart = |registers: &mut Message| restart(registers, known).is_some();
    message::edited(image, CORE, |core| {
        let mut restart = restart;
        core.change(X86, |x86| x86.change(REGISTERS, &mut restart))
    })
}

/// Sets the registers to make an interrupted call again.
fn restart(registers: &mut Message, known: Option<&Call>) -> Option<()> {
    let get = |field| registers.number(field);
    if get(field::CS)? != CODE_64_BIT || get(field::AX)? != INTERRUPTED {
        return None;
    }
    let number = match get(field::ORIG_AX)? {
        RESTART => known.filter(|known| Some(known.instruction) == get(field::IP))?.number,
        number => number,
    };
    // Where the caller wants to be told what is left of the time, the kernel has done so.
    let time = match number {
        call::NANOSLEEP => Some((field::DI, get(field::SI)?)),
        // Without flags: until a moment in time needs no change.
        call::CLOCK_NANOSLEEP if get(field::SI)? == 0 => Some((field::DX, get(field::R10)?)),
        call::CLOCK_NANOSLEEP | call::POLL | call::FUTEX => None,
        _ => return None,
    };
    let ip = get(field::IP)?.checked_sub(SYSCALL)?;
    registers.set(field::AX, number);
    registers.set(field::IP, ip);
    if let Some((request, left)) = time.filter(|(_, left)| *left != 0) {
        registers.set(request, left);
    }
    Some(())
}

/// Sets the registers in the image of a thread that was to make `call` again when `left` of its time is left. Says whether
/// it has changed anything: what is left of some calls is written in memory, and some know themselves when they end.
pub(super) fn elapsed(core: &mut Message, call: &Call, left: Duration) -> bool {
    let filtered = core.parts(THREAD).any(|thread| thread.number(SECCOMP).is_some_and(|mode| mode != 0));
    core.change(X86, |x86| {
        x86.change(REGISTERS, |registers| end_in(registers, call, left, filtered).is_some())
    })
}

fn end_in(registers: &mut Message, call: &Call, left: Duration, filtered: bool) -> Option<()> {
    let again = registers.number(field::AX)? == call.number
        && registers.number(field::IP)?.checked_add(SYSCALL)? == call.instruction
        && registers.number(field::CS)? == CODE_64_BIT;
    if !again {
        return None;
    }
    let [_, second, third, fourth, ..] = call.arguments;
    let mut answer = |result| {
        registers.set(field::AX, result);
        registers.set(field::IP, call.instruction);
    };
    // Longer than a `poll` can last it begins anew.
    let milliseconds =
        || u64::try_from(left.as_nanos().div_ceil(1_000_000)).ok().filter(|&left| left < 1 << 31);
    let (is_sleep, is_noted) = match call.number {
        call::POLL => {
            // It has none when this is negative.
            if third >> 31 & 1 == 0 {
                registers.set(field::DX, milliseconds()?);
            }
            return Some(());
        }
        // Without a wake it may return at any time, and its caller then looks at the clock.
        call::FUTEX if second & FUTEX_COMMAND == FUTEX_WAIT && fourth != 0 => {
            answer(if left.is_zero() { TIMED_OUT } else { 0 });
            return Some(());
        }
        call::NANOSLEEP => (true, second != 0),
        call::CLOCK_NANOSLEEP => (second == 0, fourth != 0),
        _ => (false, false),
    };
    if !is_sleep {
        return None;
    }
    if left.is_zero() {
        answer(0);
        return Some(());
    }
    // The length of a sleep is in memory that may be needed again, so a `poll` for nothing takes its place, which has it
    // in a register; but not where system calls are filtered.
    if is_noted || filtered {
        return None;
    }
    let milliseconds = milliseconds()?;
    registers.set(field::AX, call::POLL);
    registers.set(field::DI, 0);
    registers.set(field::SI, 0);
    registers.set(field::DX, milliseconds);
    Some(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The registers of a busybox that sleeps, as CRIU 4.2.1 dumped them.
    fn sleeping() -> Vec<(u32, u64)> {
        let mut registers: Vec<(u32, u64)> = (1..=21).map(|field| (field, 0)).collect();
        for (field, value) in [
            (field::R10, 0x7fff_1000),
            (field::AX, INTERRUPTED),
            (field::DX, 0x7fff_1000),
            (field::ORIG_AX, call::CLOCK_NANOSLEEP),
            (field::IP, 0x4b_0642),
            (field::CS, CODE_64_BIT),
        ] {
            registers[field as usize - 1].1 = value;
        }
        registers
    }

    fn image(registers: &[(u32, u64)]) -> Vec<u8> {
        let x86 = Message::of(&[(1, 77)]).with(REGISTERS, &Message::of(registers));
        let core = Message::of(&[(1, 1)]).with(X86, &x86).with(THREAD, &Message::of(&[(1, 300)]));
        message::image(CORE, &[core])
    }

    fn after(registers: &[(u32, u64)]) -> Option<Vec<(u32, u64)>> {
        let mut changed = Message::of(registers);
        restart(&mut changed, None)?;
        Some(registers.iter().map(|(field, _)| (*field, changed.number(*field).unwrap())).collect())
    }

    fn value(registers: &[(u32, u64)], field: u32) -> u64 {
        registers[field as usize - 1].1
    }

    #[test]
    fn an_interrupted_sleep_is_made_again_for_what_is_left() {
        let mut registers = sleeping();
        registers[field::R10 as usize - 1].1 = 0x7fff_2000;
        let again = after(&registers).unwrap();
        assert_eq!(value(&again, field::AX), call::CLOCK_NANOSLEEP);
        assert_eq!(value(&again, field::IP), 0x4b_0640);
        assert_eq!(value(&again, field::DX), 0x7fff_2000);
        registers[field::R10 as usize - 1].1 = 0;
        let from_the_beginning = after(&registers).unwrap();
        assert_eq!(value(&from_the_beginning, field::DX), 0x7fff_1000);
    }

    #[test]
    fn what_was_not_interrupted_or_is_not_known_stays() {
        for (field, value) in [
            (field::AX, 0),
            (field::ORIG_AX, 0),
            (field::ORIG_AX, u64::MAX),
            (field::CS, 0x23),
            (field::IP, 1),
        ] {
            let mut registers = sleeping();
            registers[field as usize - 1].1 = value;
            assert_eq!(after(&registers), None, "{field} = {value:#x}");
        }
    }

    #[test]
    fn a_call_that_had_been_interrupted_before_is_known_by_its_place() {
        let mut registers = sleeping();
        registers[field::ORIG_AX as usize - 1].1 = RESTART;
        let known = |instruction| Call {
            number: call::CLOCK_NANOSLEEP,
            arguments: [0, 0, 1, 0x7fff_1000, 0, 0],
            stack: 1 << 40,
            instruction,
        };
        let restarted = |known: Option<Call>| {
            let mut changed = Message::of(&registers);
            restart(&mut changed, known.as_ref()).and_then(|()| changed.number(field::AX))
        };
        assert_eq!(restarted(Some(known(0x4b_0642))), Some(call::CLOCK_NANOSLEEP));
        assert_eq!(restarted(Some(known(0x4b_0644))), None);
        assert_eq!(restarted(None), None);
    }

    /// The registers AX, IP, DI and DX of a thread that makes a call again, when so many milliseconds of it are left; none
    /// when nothing changes.
    fn ends(number: u64, arguments: [u64; 6], left: u64, filtered: bool) -> Option<[u64; 4]> {
        let call = Call { number, arguments, stack: 1 << 40, instruction: 0x4b_0642 };
        let [di, si, dx, r10, ..] = arguments;
        let mut registers = sleeping();
        for (field, value) in [(field::AX, number), (field::IP, 0x4b_0640), (field::DI, di), (field::SI, si)]
        {
            registers[field as usize - 1].1 = value;
        }
        registers[field::DX as usize - 1].1 = dx;
        registers[field::R10 as usize - 1].1 = r10;
        let thread = Message::of(&[(1, 0), (SECCOMP, u64::from(filtered) * 2)]);
        let x86 = Message::of(&[]).with(REGISTERS, &Message::of(&registers));
        let mut core = Message::of(&[(1, 1)]).with(X86, &x86).with(THREAD, &thread);
        let left = Duration::from_millis(left).saturating_sub(Duration::from_nanos(1));
        elapsed(&mut core, &call, left).then(|| {
            let registers = core.parts(X86).next().unwrap().parts(REGISTERS).next().unwrap();
            [field::AX, field::IP, field::DI, field::DX].map(|field| registers.number(field).unwrap())
        })
    }

    #[test]
    fn a_wait_is_made_again_for_what_is_left_or_is_over() {
        const AGAIN: u64 = 0x4b_0640;
        const AFTER: u64 = 0x4b_0642;
        assert_eq!(ends(call::POLL, [9, 1, 5000, 0, 0, 0], 700, true), Some([call::POLL, AGAIN, 9, 700]));
        assert_eq!(ends(call::POLL, [9, 1, 5000, 0, 0, 0], 0, true), Some([call::POLL, AGAIN, 9, 0]));
        assert_eq!(ends(call::FUTEX, [9, 128, 0, 8, 0, 0], 700, true), Some([0, AFTER, 9, 0]));
        assert_eq!(ends(call::FUTEX, [9, 128, 0, 8, 0, 0], 0, true), Some([TIMED_OUT, AFTER, 9, 0]));
        // One until a moment.
        assert_eq!(ends(call::FUTEX, [9, 137, 0, 8, 0, 0], 0, true), None);
        assert_eq!(ends(call::CLOCK_NANOSLEEP, [1, 1, 8, 0, 0, 0], 0, false), None);
        // Of which the kernel has written down what is left.
        assert_eq!(ends(call::NANOSLEEP, [8, 9, 0, 0, 0, 0], 700, false), None);
        for (number, arguments) in
            [(call::NANOSLEEP, [8, 0, 3, 0, 0, 0]), (call::CLOCK_NANOSLEEP, [8, 0, 3, 0, 0, 0])]
        {
            assert_eq!(ends(number, arguments, 700, false), Some([call::POLL, AGAIN, 0, 700]));
            assert_eq!(ends(number, arguments, 700, true), None);
            assert_eq!(ends(number, arguments, 0, true), Some([0, AFTER, 8, 3]));
            assert_eq!(ends(number, arguments, 1 << 31, false), None, "longer than a poll");
        }
    }

    #[test]
    fn nothing_else_in_the_image_changes() {
        let registers = sleeping();
        let expected = image(&after(&registers).unwrap());
        assert_eq!(restarted(&image(&registers), None), Some(expected));
        let mut other = image(&registers);
        other[4] ^= 1;
        assert_eq!(restarted(&other, None), None);
    }

    #[test]
    fn the_log_names_the_threads() {
        let log = "Error (criu/util.c:1534): rlimit: Can't setup\n\
                   Warn  (compel/arch/x86/src/lib/infect.c:419): Will restore 72 with interrupted system call\n\
                   Warn  (compel/arch/x86/src/lib/infect.c:419): Will restore x with interrupted system call\n";
        assert_eq!(interrupted(log).collect::<Vec<_>>(), [72]);
    }

    #[test]
    fn the_stack_is_found() {
        let mut registers = sleeping();
        registers[field::SP as usize - 1].1 = 0x7ffc_1234_5678;
        assert_eq!(stack_of(&image(&registers)), Some(0x7ffc_1234_5678));
        assert_eq!(stack_of(&image(&registers)[..40]), None);
        assert_eq!(stack_of(b"nonsense"), None);
    }

    proptest! {
        /// Whatever an image holds, and wherever it ends, it is changed or left alone.
        #[test]
        fn arbitrary_images_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
            let mut framed = image(&sleeping());
            framed.truncate(12.max(framed.len().saturating_sub(cut)));
            let _ = restarted(&framed, None);
            let _ = restarted(&bytes, None);
            let mut with_magic = message::image(CORE, &[]);
            with_magic.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
            with_magic.extend(&bytes);
            let _ = restarted(&with_magic, None);
        }
    }

    proptest! {
        /// Only the threads that CRIU names, whatever else its log holds.
        #[test]
        fn arbitrary_logs_name_no_other_threads(noise in "\\PC{0,60}", thread: u32) {
            prop_assume!(!noise.contains("Will restore"));
            let log = format!("{noise}\n(0.1) Will restore {thread} with interrupted system call\n{noise}");
            prop_assert_eq!(interrupted(&log).collect::<Vec<_>>(), [thread]);
            prop_assert_eq!(interrupted(&noise).count(), 0);
        }
    }
}
