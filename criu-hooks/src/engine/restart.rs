//! System calls that sleep, and go on sleeping after a restore.
//!
//! A thread that is dumped in `nanosleep`, `poll` or a timed `futex` would be restored with that call ended early, by
//! EINTR: CRIU cannot carry over how the kernel meant to restart it, and says so in its log ("Will restore N with
//! interrupted system call"). Programs that do not expect that, as busybox's `sleep`, would end. So the registers in the
//! image are set to make the call again: for what is left of the time, where the kernel has noted that for the caller,
//! and from the beginning where it has not.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::BorrowedFd,
};

use protobuf::{CodedInputStream, CodedOutputStream};
use rustix::fs::{Mode, OFlags};

/// The longest log that is searched, and the longest image of a thread that is changed, in bytes.
const MAX: u64 = 1 << 20;
/// What every image begins with, and what one of a thread does.
const MAGIC: [u32; 2] = [0x5456_4319, 0x5505_3847];
/// The fields of an image of a thread: its part for x86, and in that its registers.
const X86: u32 = 2;
const REGISTERS: u32 = 2;

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
/// -EINTR.
const INTERRUPTED: u64 = 4_u64.wrapping_neg();
/// The length of the instruction `syscall`.
const SYSCALL: u64 = 2;

/// Lets the calls go on that `log` names as interrupted, in the images of a dump whose processes still stand still.
/// Returns how many.
pub(super) fn let_calls_go_on(images: BorrowedFd<'_>, work: BorrowedFd<'_>, log: &str) -> io::Result<usize> {
    let log = read(&open(work, log, OFlags::RDONLY)?)?;
    let mut changed = 0;
    for thread in interrupted(&String::from_utf8_lossy(&log)) {
        let Some(inside) = id_inside(thread) else { continue };
        let file = open(images, &format!("core-{inside}.img"), OFlags::RDWR)?;
        let Some(image) = restarted(&read(&file)?) else { continue };
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
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    if [word(0)?, word(4)?] != MAGIC {
        return None;
    }
    let core = image.get(12..)?.get(..usize::try_from(word(8)?).ok()?)?;
    let mut stack = None;
    // Nothing is changed: this is how a part of a part is found.
    let mut look = |registers: &[u8]| {
        let mut input = CodedInputStream::from_bytes(registers);
        while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
            if tag & 7 != 0 {
                return None;
            }
            let value = input.read_raw_varint64().ok()?;
            if tag >> 3 == field::SP {
                stack = Some(value);
            }
        }
        None
    };
    with_part(core, X86, |x86| with_part(x86, REGISTERS, &mut look));
    stack
}

/// The threads whose calls were interrupted, by their ids here.
fn interrupted(log: &str) -> impl Iterator<Item = u32> {
    log.lines().filter_map(|line| {
        let (_, rest) = line.split_once("Will restore ")?;
        rest.strip_suffix(" with interrupted system call")?.parse().ok()
    })
}

/// A thread's id in the innermost PID namespace that it is in: the one that its image is named by.
fn id_inside(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    ids.split_whitespace().next_back()?.parse().ok()
}

pub(super) fn open(directory: BorrowedFd<'_>, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?.into())
}

fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces a file's contents. When that fails the dump must: half an image is none.
pub(super) fn replace(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
    file.set_len(0)?;
    file.write_all(bytes)
}

/// The image of a thread with its interrupted call to be made again; none when there is no such call, or the image is
/// not as known.
fn restarted(image: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    if [word(0)?, word(4)?] != MAGIC {
        return None;
    }
    let length = usize::try_from(word(8)?).ok()?;
    let core = image.get(12..12 + length)?;
    let rest = &image[12 + length..];
    let core = with_part(core, X86, |x86| with_part(x86, REGISTERS, restarted_registers))?;
    let mut changed = image[..8].to_vec();
    changed.extend(u32::try_from(core.len()).ok()?.to_le_bytes());
    changed.extend(core);
    changed.extend(rest);
    Some(changed)
}

/// The message with its one part `field` changed; everything else stays byte for byte.
fn with_part(message: &[u8], field: u32, change: impl FnOnce(&[u8]) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        if tag == field << 3 | 2 {
            let start = usize::try_from(input.pos()).ok()?;
            let part = input.read_bytes().ok()?;
            let end = usize::try_from(input.pos()).ok()?;
            let changed = change(&part)?;
            let mut length = Vec::new();
            let mut output = CodedOutputStream::vec(&mut length);
            output.write_raw_varint64(u64::try_from(changed.len()).ok()?).ok()?;
            output.flush().ok()?;
            drop(output);
            return Some([&message[..start], &length, &changed, &message[end..]].concat());
        }
        match tag & 7 {
            0 => drop(input.read_raw_varint64().ok()?),
            1 => drop(input.read_fixed64().ok()?),
            2 => drop(input.read_bytes().ok()?),
            5 => drop(input.read_fixed32().ok()?),
            _ => return None,
        }
    }
    None
}

fn restarted_registers(message: &[u8]) -> Option<Vec<u8>> {
    let mut registers = Vec::new();
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        // All of them are plain numbers.
        if tag & 7 != 0 {
            return None;
        }
        registers.push((tag >> 3, input.read_raw_varint64().ok()?));
    }
    restart(&mut registers)?;
    let mut changed = Vec::new();
    let mut output = CodedOutputStream::vec(&mut changed);
    for (field, value) in registers {
        output.write_uint64(field, value).ok()?;
    }
    output.flush().ok()?;
    drop(output);
    Some(changed)
}

/// Sets the registers to make an interrupted call again.
fn restart(registers: &mut [(u32, u64)]) -> Option<()> {
    let get = |field| registers.iter().find(|(of, _)| *of == field).map(|(_, value)| *value);
    if get(field::CS)? != CODE_64_BIT || get(field::AX)? != INTERRUPTED {
        return None;
    }
    let number = get(field::ORIG_AX)?;
    // Where the caller wants to be told what is left of the time, the kernel has done so.
    let time = match number {
        call::NANOSLEEP => Some((field::DI, get(field::SI)?)),
        // Without flags: until a moment in time needs no change.
        call::CLOCK_NANOSLEEP if get(field::SI)? == 0 => Some((field::DX, get(field::R10)?)),
        call::CLOCK_NANOSLEEP | call::POLL | call::FUTEX => None,
        _ => return None,
    };
    let ip = get(field::IP)?.checked_sub(SYSCALL)?;
    let mut set = |field, value| {
        if let Some(register) = registers.iter_mut().find(|(of, _)| *of == field) {
            register.1 = value;
        }
    };
    set(field::AX, number);
    set(field::IP, ip);
    if let Some((request, left)) = time.filter(|(_, left)| *left != 0) {
        set(request, left);
    }
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

    fn message(fields: &[(u32, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut output = CodedOutputStream::vec(&mut bytes);
        for (field, value) in fields {
            output.write_uint64(*field, *value).unwrap();
        }
        output.flush().unwrap();
        drop(output);
        bytes
    }

    fn image(registers: &[(u32, u64)]) -> Vec<u8> {
        let nest = |before: &[u8], part: &[u8], after: &[u8]| {
            let mut bytes = before.to_vec();
            let mut output = CodedOutputStream::vec(&mut bytes);
            output.write_bytes(2, part).unwrap();
            output.flush().unwrap();
            drop(output);
            bytes.extend(after);
            bytes
        };
        let x86 = nest(&message(&[(1, 77)]), &message(registers), &message(&[(9, 1)]));
        let core = nest(&message(&[(1, 1)]), &x86, &message(&[(5, 300)]));
        let mut image: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
        image.extend(u32::try_from(core.len()).unwrap().to_le_bytes());
        image.extend(core);
        image
    }

    fn after(registers: &[(u32, u64)]) -> Option<Vec<(u32, u64)>> {
        let mut changed = registers.to_vec();
        restart(&mut changed).map(|()| changed)
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
    fn nothing_else_in_the_image_changes() {
        let registers = sleeping();
        let expected = image(&after(&registers).unwrap());
        assert_eq!(restarted(&image(&registers)), Some(expected));
        let mut other = image(&registers);
        other[4] ^= 1;
        assert_eq!(restarted(&other), None);
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
            let _ = restarted(&framed);
            let _ = restarted(&bytes);
            let mut with_magic: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
            with_magic.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
            with_magic.extend(&bytes);
            let _ = restarted(&with_magic);
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
