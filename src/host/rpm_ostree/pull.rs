//! The progress of a pull, from rpm-ostreed's lines: `ostree chunk layers needed: 3 (310.5 MB)` and `[1/4] Fetching layer
//! sha256:0123456789ab (51.4 MB)` (rpm-ostree 2026.2, `sysroot_upgrade.rs`).

use std::time::Duration;

/// The layers of one pull.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pull {
    /// Bytes of all layers that the daemon has to fetch.
    needed: u64,
    /// Bytes of the layers that are fetched.
    done: u64,
    /// Bytes of the layer that is being fetched, and when the first one began, since the start of the transaction.
    current: Option<(u64, Duration)>,
}

impl Pull {
    /// The line to show for the daemon's `line`, at `now` since the start of the transaction. Pure.
    pub(super) fn line(&mut self, line: &str, now: Duration) -> String {
        if let Some(bytes) = line.split_once(" needed: ").and_then(|(_, rest)| size(rest)) {
            self.needed = self.needed.saturating_add(bytes);
        }
        let layer = line.strip_prefix('[').and_then(|rest| rest.split_once("] Fetching "));
        let Some(((number, of), bytes)) = layer.and_then(|(at, rest)| at.split_once('/').zip(size(rest))) else {
            return line.to_owned();
        };
        let (last, began) = self.current.unwrap_or((0, now));
        self.done = self.done.saturating_add(last);
        self.current = Some((bytes, began));
        let (done, needed) = (self.done / MB, self.needed.max(self.done) / MB);
        let rate = u128::from(self.done).checked_div(now.saturating_sub(began).as_millis()).unwrap_or(0) / 1000;
        format!("layer {number} of {of}, {done} of {needed} MB pulled, {rate} MB/s; {line}")
    }
}

/// Bytes of a megabyte, as GLib prints it.
const MB: u64 = 1_000_000;

/// The size in brackets at the end, as g_format_size() prints it: `51.4 MB`, with a no-break space.
fn size(text: &str) -> Option<u64> {
    let (number, unit) = text.strip_suffix(')')?.rsplit_once('(')?.1.split_once(['\u{a0}', ' '])?;
    let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
    let tenths = whole.parse::<u64>().ok()?.checked_mul(10)?.checked_add(tenth.parse().ok()?)?;
    let unit = match unit {
        "byte" | "bytes" => 1,
        "kB" => 1_000,
        "MB" => MB,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    tenths.checked_mul(unit).map(|bytes| bytes / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_bytes_and_rate_are_summed_up() {
        let mut pull = Pull::default();
        let mut line = |text: &str, second: u64| pull.line(text, Duration::from_secs(second));
        assert_eq!(line("Pulling manifest: x", 0), "Pulling manifest: x");
        line("ostree chunk layers already present: 60", 1);
        line("ostree chunk layers needed: 2 (1.2\u{a0}GB)", 1);
        line("custom layers needed: 1 (300.0\u{a0}MB)", 1);
        let first = line("[1/3] Fetching ostree chunk sha256:0123 (900.0\u{a0}MB)", 2);
        assert!(first.starts_with("layer 1 of 3, 0 of 1500 MB pulled, 0 MB/s; [1/3] "), "{first}");
        let second = line("[2/3] Fetching ostree chunk sha256:4567 (300 MB)", 20);
        assert!(second.starts_with("layer 2 of 3, 900 of 1500 MB pulled, 50 MB/s; "), "{second}");
        let third = line("[3/3] Fetching layer sha256:89ab (12 bytes)", 22);
        assert!(third.starts_with("layer 3 of 3, 1200 of 1500 MB pulled, 60 MB/s; "), "{third}");
    }

    #[test]
    fn other_lines_are_shown_as_they_are() {
        let huge = format!("[1/2] Fetching layer x ({} GB)", u64::MAX);
        for text in ["", "[1/2] Fetching", "[1/2] Fetching x (1 parsec)", "[x] Fetching y (1 MB)", " needed: (", &huge]
        {
            assert_eq!(Pull::default().line(text, Duration::ZERO), text);
        }
    }
}
