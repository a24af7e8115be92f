//! QEMU's command line.

use std::fs::{self, File};
use std::path::Path;

/// What boots: disks, console and size.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    /// The kernel.
    pub(super) kernel: &'a Path,
    /// The disks, which the guest finds in any order; none is written.
    pub(super) disks: [&'a Path; 3],
    /// What the kernel is told beside where its console is.
    pub(super) append: &'a str,
    /// The file that gets what the kernel prints.
    pub(super) console: &'a Path,
    /// The file that gets the guest's last word.
    pub(super) status: &'a Path,
    /// The descriptor, inherited, that gets the output of the guest's command.
    pub(super) output: i32,
    /// How instructions are executed.
    pub(super) accelerator: Accelerator,
    /// The guest's memory in MiB.
    pub(super) memory_mib: u32,
    /// The guest's processors.
    pub(super) processors: u32,
}

/// How a guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By software, 10 to 50 times slower.
    Tcg,
}

impl Accelerator {
    /// The one to be used here: `AGENTCUBE_VM_ACCEL` when it is set, or else the better one that works.
    pub fn choose() -> Self {
        match std::env::var("AGENTCUBE_VM_ACCEL").as_deref() {
            Ok("tcg") => Self::Tcg,
            Ok("kvm") => Self::Kvm,
            _ if File::options().read(true).write(true).open("/dev/kvm").is_ok()
                && virtualizes(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()) =>
            {
                Self::Kvm
            }
            _ => Self::Tcg,
        }
    }

    /// How many times longer than on the host a test may wait for things in the guest.
    pub(super) fn patience(self) -> u32 {
        match self {
            Self::Kvm => 3,
            Self::Tcg => 20,
        }
    }
}

/// Whether the processor itself can run guests. A host without that may have `/dev/kvm` all the same, for guests with a
/// kernel of their own kind.
fn virtualizes(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// QEMU's arguments.
pub(super) fn arguments(machine: &Machine<'_>) -> Vec<String> {
    let mut arguments = vec![];
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
    add(&["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "q35", "-cpu", "max"]);
    add(&[
        "-accel",
        match machine.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=single",
        },
    ]);
    add(&["-smp", &machine.processors.to_string(), "-m", &format!("{}M", machine.memory_mib)]);
    add(&["-kernel", &machine.kernel.to_string_lossy()]);
    add(&["-append", &format!("console=ttyS0 {}", machine.append)]);
    add(&["-serial", &format!("file:{}", escaped(machine.console))]);
    add(&["-device", "nvme,id=disks,serial=agentcube"]);
    for (number, disk) in (1..).zip(machine.disks) {
        // Writes go to a temporary file that has no name.
        let file = escaped(disk);
        add(&["-drive", &format!("if=none,id=disk{number},format=raw,snapshot=on,cache=unsafe,file={file}")]);
        add(&["-device", &format!("nvme-ns,bus=disks,drive=disk{number},nsid={number}")]);
    }
    add(&["-device", "virtio-serial", "-add-fd", &format!("fd={},set=1", machine.output)]);
    // Without append= it would be truncated, which a pipe refuses.
    add(&["-chardev", "file,id=output,append=on,path=/dev/fdset/1"]);
    add(&["-device", "virtserialport,chardev=output,name=output"]);
    add(&["-chardev", &format!("file,id=status,path={}", escaped(machine.status))]);
    add(&["-device", "virtserialport,chardev=status,name=status"]);
    add(&["-device", "virtio-rng-pci"]);
    arguments
}

/// A path within an option of QEMU's, where a comma must be doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_processor_that_says_so_runs_guests() {
        assert!(virtualizes("processor: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(virtualizes("flags : svm\n"));
        assert!(!virtualizes("flags : fpu vmmcall\nvmx flags : ept\n"));
        assert!(!virtualizes(""));
    }

    #[test]
    fn no_disk_is_written() {
        let path = Path::new;
        let machine = Machine {
            kernel: path("/k"),
            disks: [path("/a"), path("/b,c"), path("/d")],
            append: "quiet",
            console: path("/console"),
            status: path("/status"),
            output: 9,
            accelerator: Accelerator::Tcg,
            memory_mib: 2048,
            processors: 2,
        };
        let arguments = arguments(&machine);
        let drives: Vec<_> = arguments.iter().filter(|word| word.starts_with("if=none")).collect();
        assert_eq!(drives.len(), 3);
        assert!(drives.iter().all(|drive| drive.contains("snapshot=on")), "{drives:?}");
        assert!(drives[1].ends_with("file=/b,,c"), "{drives:?}");
        assert!(arguments.contains(&"nvme-ns,bus=disks,drive=disk2,nsid=2".to_owned()));
        assert!(arguments.contains(&"console=ttyS0 quiet".to_owned()));
    }
}
