//! Lists all files that the processes of some units open for writing, create, remove, rename or change the attributes
//! of, on any file system that they see. One line of JSON for each.
//!
//!   watch-writes UNIT...
//!
//! fanotify reports the process but not its unit, and short-lived processes end before a lookup. So every exec waits
//! until its process is recorded, and the file systems of its mount namespace are watched from then on.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response};
use serde_json::json;

/// `FAN_REPORT_DIR_FID | FAN_REPORT_NAME`, which nix does not name: events contain the directory entry.
const REPORT_NAMES: InitFlags = InitFlags::from_bits_retain(0x0c00);
/// An information record that ends with the entry's name.
const INFO_DFID_NAME: u8 = 2;

/// The identity of a process.
#[derive(Clone)]
struct Process {
    unit: String,
    program: String,
}

struct Watch {
    units: HashSet<String>,
    processes: Mutex<HashMap<i32, Process>>,
    /// Device numbers of the watched file systems.
    marked: Mutex<HashSet<String>>,
    /// Reports execs, and the kernel's files that were opened for writing.
    files: Fanotify,
    /// Reports all other events, with the entry's name.
    names: Fanotify,
}

fn main() -> Result<()> {
    let units: HashSet<String> = std::env::args().skip(1).collect();
    ensure!(!units.is_empty(), "usage: watch-writes UNIT...");
    let flags = EventFFlags::O_RDONLY | EventFFlags::O_LARGEFILE | EventFFlags::O_CLOEXEC;
    let unlimited = InitFlags::FAN_CLOEXEC | InitFlags::FAN_UNLIMITED_QUEUE | InitFlags::FAN_UNLIMITED_MARKS;
    let files = Fanotify::init(unlimited | InitFlags::FAN_CLASS_CONTENT, flags).context("fanotify")?;
    let names = Fanotify::init(unlimited | InitFlags::FAN_CLASS_NOTIF | REPORT_NAMES, flags).context("fanotify")?;
    let watch = Arc::new(Watch { units, processes: Mutex::default(), marked: Mutex::default(), files, names });
    // Programs are on the root file system.
    watch
        .files
        .mark(
            MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM,
            MaskFlags::FAN_OPEN_EXEC_PERM,
            AT_FDCWD,
            Some("/"),
        )
        .context("watching execs")?;
    watch.mark_all(Path::new("/proc/self"));
    ready()?;
    let naming = watch.clone();
    std::thread::spawn(move || {
        if let Err(error) = naming.read_names() {
            eprintln!("watch-writes: {error:#}");
            std::process::exit(1);
        }
    });
    watch.read_files()
}

/// Tells systemd that the watch is complete.
fn ready() -> Result<()> {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET") {
        UnixDatagram::unbound()?.send_to(b"READY=1", PathBuf::from(socket))?;
    }
    Ok(())
}

impl Watch {
    /// Watches the file systems of a process's mount namespace that are not watched yet.
    fn mark_all(&self, process: &Path) {
        let Ok(mounts) = fs::read_to_string(process.join("mountinfo")) else { return };
        for line in mounts.lines() {
            // ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS ... - TYPE SOURCE OPTIONS
            let fields: Vec<&str> = line.split(' ').collect();
            let (Some(device), Some(point)) = (fields.get(2), fields.get(4)) else { continue };
            let kind = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
            if !self.marked.lock().expect("not poisoned").insert((*device).to_owned()) {
                continue;
            }
            let path = process.join("root").join(point.trim_start_matches('/').replace("\\040", " "));
            let add = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
            let writes = MaskFlags::FAN_CLOSE_WRITE | MaskFlags::FAN_MODIFY;
            let entries = MaskFlags::FAN_CREATE
                | MaskFlags::FAN_DELETE
                | MaskFlags::FAN_MOVED_FROM
                | MaskFlags::FAN_MOVED_TO
                | MaskFlags::FAN_ATTRIB
                | MaskFlags::FAN_ONDIR;
            // Some of the kernel's own file systems cannot name entries.
            let how = match self.names.mark(add, writes | entries, AT_FDCWD, Some(&path)) {
                Ok(()) => "watched".to_owned(),
                Err(_) => match self.files.mark(add, writes, AT_FDCWD, Some(&path)) {
                    Ok(()) => "watched for writes".to_owned(),
                    Err(error) => format!("not watched: {error}"),
                },
            };
            println!("{}", json!({ "filesystem": point, "type": kind, "device": device, "is": how }));
        }
    }

    fn read_files(&self) -> Result<()> {
        loop {
            let events = match self.files.read_events() {
                Ok(events) => events,
                // The kernel opens a file to report it, which some of its own files refuse: that event is lost.
                Err(error) => {
                    println!("{}", json!({ "lost": error.to_string() }));
                    continue;
                }
            };
            for event in events {
                let mask = event.mask();
                let Some(fd) = event.fd() else {
                    ensure!(!mask.contains(MaskFlags::FAN_Q_OVERFLOW), "events were lost");
                    continue;
                };
                let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
                if mask.contains(MaskFlags::FAN_OPEN_EXEC_PERM) {
                    self.note(event.pid(), &path);
                    self.files.write_response(FanotifyResponse::new(fd, Response::FAN_ALLOW))?;
                } else {
                    self.tell(event.pid(), mask, &path.to_string_lossy());
                }
            }
        }
    }

    fn read_names(&self) -> Result<()> {
        // Read without nix's interpretation, which omits the names.
        let mut group = fs::File::from(self.names.as_fd().try_clone_to_owned()?);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = group.read(&mut buffer)?;
            let mut rest = &buffer[..length];
            while let Some((event, next)) = parse(rest) {
                ensure!(!event.mask.contains(MaskFlags::FAN_Q_OVERFLOW), "events were lost");
                self.tell(event.pid, event.mask, &event.name);
                rest = next;
            }
        }
    }

    /// A process is about to execute a program.
    fn note(&self, pid: i32, program: &Path) {
        let name = program.to_string_lossy().into_owned();
        // The loader is opened the same way, after the program.
        if name.contains("/ld-linux") {
            return;
        }
        let Some(unit) = unit_of(pid) else { return };
        if self.units.contains(&unit) {
            self.mark_all(Path::new(&format!("/proc/{pid}")));
        }
        self.processes.lock().expect("not poisoned").insert(pid, Process { unit, program: name });
    }

    fn tell(&self, pid: i32, mask: MaskFlags, path: &str) {
        let known = self.processes.lock().expect("not poisoned").get(&pid).cloned();
        let process = known.or_else(|| {
            let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default().to_string_lossy().into_owned();
            Some(Process { unit: unit_of(pid)?, program })
        });
        if let Some(Process { unit, program }) = process.filter(|process| self.units.contains(&process.unit)) {
            println!("{}", json!({ "unit": unit, "program": program, "pid": pid, "path": path, "did": did(mask) }));
        }
    }
}

struct Event {
    mask: MaskFlags,
    pid: i32,
    name: String,
}

/// One event of the group that reports names, and the rest of the buffer.
fn parse(bytes: &[u8]) -> Option<(Event, &[u8])> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let length = usize::try_from(u32_at(0)?).ok()?;
    let mask = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let pid = i32::from_ne_bytes(bytes.get(20..24)?.try_into().ok()?);
    let mut name = String::new();
    let mut record = bytes.get(24..length)?;
    while record.len() >= 4 {
        let size = usize::from(u16::from_ne_bytes([record[2], record[3]]));
        if size < 4 || size > record.len() {
            break;
        }
        if record[0] == INFO_DFID_NAME {
            // Header, file system id, size and type of the handle, handle, name.
            let handle = usize::try_from(u32::from_ne_bytes(record.get(12..16)?.try_into().ok()?)).ok()?;
            let text = record.get(20 + handle..size)?;
            name = String::from_utf8_lossy(text.split(|byte| *byte == 0).next()?).into_owned();
        }
        record = &record[size..];
    }
    Some((Event { mask: MaskFlags::from_bits_retain(mask), pid, name }, bytes.get(length..)?))
}

/// The unit whose control group a process is in.
fn unit_of(pid: i32) -> Option<String> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    path.split('/').find(|part| part.ends_with(".service")).map(str::to_owned)
}

fn did(mask: MaskFlags) -> Vec<&'static str> {
    const NAMES: [(MaskFlags, &str); 7] = [
        (MaskFlags::FAN_CLOSE_WRITE, "had it open for writing"),
        (MaskFlags::FAN_MODIFY, "wrote"),
        (MaskFlags::FAN_CREATE, "created"),
        (MaskFlags::FAN_DELETE, "deleted"),
        (MaskFlags::FAN_MOVED_FROM, "moved away"),
        (MaskFlags::FAN_MOVED_TO, "moved there"),
        (MaskFlags::FAN_ATTRIB, "changed attributes"),
    ];
    NAMES.iter().filter(|(flag, _)| mask.contains(*flag)).map(|(_, name)| *name).collect()
}
