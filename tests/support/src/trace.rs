//! File system changes by the agent's processes, recorded with strace(1): every call that could change a file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, ensure};

/// Names the directory for traces of the agent, if it is to be traced.
const DIRECTORY: &str = "REBASE_TEST_TRACE";
/// A `?` before a name: not every architecture, kernel or strace has the call.
const CALLS: &str = "?open,openat,?openat2,?creat,?open_by_handle_at,?rename,?renameat,renameat2,?unlink,unlinkat,?rmdir,\
    ?mkdir,mkdirat,?mknod,mknodat,?symlink,symlinkat,?link,linkat,?chmod,fchmod,fchmodat,?fchmodat2,?chown,?lchown,fchown,\
    fchownat,truncate,ftruncate,fallocate,?utime,?utimes,?futimesat,utimensat,setxattr,lsetxattr,fsetxattr,removexattr,\
    lremovexattr,fremovexattr,mount,umount2,?move_mount,?open_tree,?fsopen,?fsmount,?mount_setattr,pivot_root,chroot,\
    bind,?io_uring_setup,memfd_create,execve,?execveat,swapon,acct,\
    ?landlock_create_ruleset";

/// A command for the agent; traced, with all its children, when `REBASE_TEST_TRACE` names a directory.
#[must_use]
pub fn agent(program: &Path) -> Command {
    match std::env::var_os(DIRECTORY) {
        Some(directory) => traced(program, Path::new(&directory), &[]),
        None => Command::new(program),
    }
}

/// A command for a program that is traced into files in `directory`, with more arguments for strace.
#[must_use]
pub fn traced(program: &Path, directory: &Path, arguments: &[&str]) -> Command {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let mut command = Command::new("strace");
    // The tracer is not the agent's parent and not in its process group: signals and exit codes are the agent's own.
    command.args(["--daemonize=pgroup", "-ff", "--seccomp-bpf", "-qq", "-y", "-s", "1024", "-e"]);
    command.arg(format!("trace={CALLS}"));
    command.args(arguments).arg("-o").arg(directory.join(name)).arg("--").arg(program);
    command
}

/// Findings of traces.
#[derive(Debug, Default)]
pub struct Findings {
    /// The number of processes that ran each program; threads count as processes.
    pub programs: BTreeMap<String, usize>,
    /// The number of calls read.
    pub calls: usize,
    /// Files created in memory, by name.
    pub in_memory: BTreeSet<String>,
    /// Other descriptors opened for writing that are not files on a disk.
    pub devices: BTreeSet<String>,
    /// Calls that would have changed a file and were stopped; by call and error.
    pub stopped: BTreeMap<String, usize>,
    /// Calls that changed a file.
    pub changes: Vec<String>,
}

impl Findings {
    /// Reads every trace in a directory.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let mut findings = Self::default();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
            findings.take(&String::from_utf8_lossy(&text));
        }
        Ok(findings)
    }

    /// An empty trace proves nothing: the agent, its engine and the engine's policy in memory must be in it.
    pub fn is_not_blind(&self) -> anyhow::Result<()> {
        for program in ["rebase-agent", "skopeo"] {
            let ran = self.programs.keys().any(|name| name.starts_with(program));
            ensure!(ran, "no {program} ran: {:?}", self.programs);
        }
        ensure!(self.in_memory.contains("policy.json"), "no policy in memory was seen: {:?}", self.in_memory);
        ensure!(self.devices.contains("/dev/null"), "/dev/null was never opened for writing: {:?}", self.devices);
        Ok(())
    }

    /// Reads the trace of one process.
    pub fn take(&mut self, trace: &str) {
        for line in trace.lines() {
            self.line(line);
        }
    }

    fn line(&mut self, line: &str) {
        let Some((call, rest)) = line.split_once('(') else { return };
        if !call.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
            return;
        }
        self.calls += 1;
        // A call that a signal interrupted counts as done.
        let (arguments, result) = rest.rsplit_once(") = ").unwrap_or((rest, "?"));
        let failed = result.starts_with("-1 ");
        match call {
            "execve" | "execveat" => {
                if let (false, Some(program)) = (failed, quoted(arguments)) {
                    // The dynamic linker of another Debian runs its skopeo.
                    let name = if program.contains("/ld-") { last_program(arguments) } else { program };
                    *self.programs.entry(basename(&name)).or_default() += 1;
                }
                return;
            }
            // Traced only so that strace can make it fail.
            "landlock_create_ruleset" => return,
            "memfd_create" => {
                self.in_memory.extend(quoted(arguments));
                return;
            }
            "open" | "openat" | "openat2" => {
                const WRITES: [&str; 6] = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"];
                let flags = arguments.rsplit_once("\", ").map_or(arguments, |(_, flags)| flags);
                if !flags.split(|c: char| !(c.is_ascii_uppercase() || c == '_')).any(|flag| WRITES.contains(&flag)) {
                    return;
                }
            }
            // A socket in the file system is a file; other sockets are not.
            "bind" if !arguments.contains("sun_path=\"") => return,
            _ => {}
        }
        if failed {
            let error = result.split(' ').nth(1).unwrap_or_default();
            *self.stopped.entry(format!("{call}: {error}")).or_default() += 1;
            return;
        }
        // For calls that open: the result. For calls on a descriptor: the descriptor's file.
        // A process that is killed within the call has no result, but the path names the file.
        let unfinished = quoted(arguments).filter(|_| result.trim() == "?");
        let opened = inside(result).or(unfinished.as_deref());
        let subject = if call.starts_with("open") { opened } else { inside(arguments) };
        match subject {
            Some("/dev/null") => {
                self.devices.insert("/dev/null".to_owned());
            }
            Some(subject)
                if ["/memfd:", "pipe:[", "socket:[", "UNIX", "TCP", "UDP", "NETLINK"]
                    .iter()
                    .any(|start| subject.starts_with(start))
                    && call != "bind" =>
            {
                self.devices.insert(subject.split([':', '[']).next().unwrap_or_default().to_owned());
            }
            _ => self.changes.push(line.to_owned()),
        }
    }
}

/// The first string argument.
fn quoted(arguments: &str) -> Option<String> {
    Some(arguments.split('"').nth(1)?.to_owned())
}

/// `ld.so --library-path P PROGRAM ARGUMENTS...`: the program.
fn last_program(arguments: &str) -> String {
    let strings: Vec<&str> = arguments.split('"').skip(1).step_by(2).collect();
    strings.get(4).copied().unwrap_or_default().to_owned()
}

fn basename(path: &str) -> String {
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

/// strace -y's description of a descriptor: `7</memfd:policy.json>`.
fn inside(text: &str) -> Option<&str> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let subject = text.get(digits..)?.strip_prefix('<').filter(|_| digits > 0)?;
    subject.split_once('>').map(|(subject, _)| subject.trim_end_matches(" (deleted)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(trace: &str) -> Vec<String> {
        let mut findings = Findings::default();
        findings.take(trace);
        findings.changes
    }

    #[test]
    fn reads_and_other_descriptors_are_not_changes() {
        let trace = "execve(\"/usr/bin/rebase-agent\", [\"rebase-agent\"], 0x7ff /* 9 vars */) = 0\n\
            openat(AT_FDCWD</>, \"/etc/hosts\", O_RDONLY|O_CLOEXEC) = 3</etc/hosts>\n\
            openat(AT_FDCWD</>, \"/dev/null\", O_RDWR|O_CLOEXEC) = 3</dev/null>\n\
            openat(AT_FDCWD</>, \"/dev/null\", O_WRONLY|O_CLOEXEC) = ?\n\
            openat(AT_FDCWD</>, \"/var/lib/x\", O_RDWR|O_CREAT, 0644) = -1 EACCES (Permission denied)\n\
            mkdirat(AT_FDCWD</>, \"/var/lib/containers\", 0700) = -1 EROFS (Read-only file system)\n\
            memfd_create(\"policy.json\", MFD_ALLOW_SEALING) = 9</memfd:policy.json>\n\
            ftruncate(9</memfd:policy.json>, 5) = 0\n\
            bind(5<NETLINK:[12]>, {sa_family=AF_NETLINK, nl_pid=0}, 12) = 0\n\
            --- SIGCHLD {si_signo=SIGCHLD} ---\n+++ exited with 0 +++\n";
        let mut findings = Findings::default();
        findings.take(trace);
        assert_eq!(findings.changes, [""; 0]);
        assert_eq!(findings.stopped.values().sum::<usize>(), 2);
        assert_eq!(findings.programs.keys().collect::<Vec<_>>(), ["rebase-agent"]);
        assert_eq!(findings.calls, 9);
        assert!(findings.is_not_blind().is_err());
    }

    #[test]
    fn every_kind_of_change_is_found() {
        for line in [
            "openat(AT_FDCWD</>, \"/tmp/x\", O_WRONLY|O_CREAT|O_TRUNC, 0644) = 3</tmp/x>",
            "openat(AT_FDCWD</>, \"x O_RDONLY\", O_RDONLY|O_CREAT, 0644) = 3</tmp/x>",
            "openat(AT_FDCWD</>, \"/tmp\", O_RDWR|O_EXCL|O_TMPFILE, 0600) = 3</tmp/#1 (deleted)>",
            "openat2(AT_FDCWD</>, \"/tmp/x\", {flags=O_WRONLY|O_APPEND, resolve=0}, 24) = 3</tmp/x>",
            "creat(\"/tmp/x\", 0644) = 3</tmp/x>",
            "renameat2(AT_FDCWD</>, \"a\", AT_FDCWD</>, \"b\", 0) = 0",
            "unlink(\"/run/x\") = 0",
            "bind(3<UNIX-STREAM:[7]>, {sa_family=AF_UNIX, sun_path=\"/run/x\"}, 9) = 0",
            "fchmod(3</etc/x>, 0600) = 0",
            "ftruncate(3</etc/x>, 0) = 0",
            "io_uring_setup(8, {flags=0}) = 3<anon_inode:[io_uring]>",
            "mount(\"t\", \"/mnt\", \"tmpfs\", 0, NULL) = 0",
            "openat(AT_FDCWD</>, \"/etc/x\", O_WRONLY <unfinished ...>",
        ] {
            assert_eq!(changes(line), [line]);
        }
    }
}
