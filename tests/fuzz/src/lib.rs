//! What the targets have in common: how much memory a parser takes, and what may be told of foreign text.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn more(size: usize) {
    let live = LIVE.fetch_add(size, Relaxed) + size;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
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

/// Runs `parser`, which may take 64 KiB and `factor` bytes for each of the `input`'s.
///
/// # Panics
/// If it takes more.
pub fn bounded<T>(input: usize, factor: usize, parser: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = parser();
    let taken = PEAK.load(Relaxed).saturating_sub(before);
    assert!(taken <= (64 << 10) + factor * input, "{taken} bytes of memory for {input} bytes of input");
    result
}

/// `text` is what people are shown.
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
