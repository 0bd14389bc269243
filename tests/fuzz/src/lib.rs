//! Code shared by the targets: limits for a parser's memory and for text from outside.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn more(size: usize) {
    let live = LIVE.fetch_add(size, Relaxed) + size;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call is passed on unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        more(size);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `parser`, which may use 64 KiB and `factor` bytes for each byte of `input`.
///
/// # Panics
/// If it uses more.
pub fn bounded<T>(input: usize, factor: usize, parser: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = parser();
    let taken = PEAK.load(Relaxed).saturating_sub(before);
    assert!(taken <= (64 << 10) + factor * input, "{taken} bytes of memory for {input} bytes of input");
    result
}

/// Checks a `text` that users see.
///
/// # Panics
/// If it has control characters, or more than `limit` characters.
pub fn shown(text: &str, limit: usize) {
    assert!(!text.contains(char::is_control), "control characters: {text:?}");
    assert!(text.chars().count() <= limit, "{} characters of at most {limit}: {text}", text.chars().count());
}

/// Splits `data` after its first line.
#[must_use]
pub fn first_line(data: &[u8]) -> (&[u8], &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    (&data[..end], data.get(end + 1..).unwrap_or_default())
}
