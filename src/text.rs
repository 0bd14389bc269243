//! Foreign text, made fit to be shown. Pure; [`crate::model`] re-exports it.

/// Foreign text made safe to print: control characters escaped, runs of white space joined, fewer than `max` characters before an ellipsis.
/// Registries, daemons and annotations put newlines and terminal escapes into their errors.
#[must_use]
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::new();
    let mut length = 0;
    for c in text.trim().chars() {
        let before = out.len();
        match c {
            '\n' | '\r' | '\t' | ' ' if out.ends_with(' ') => {}
            '\n' | '\r' | '\t' => out.push(' '),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
        length += out.get(before..).map_or(0, |added| added.chars().count());
        if length >= max {
            out.truncate(before);
            out.push('…');
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_bounded_and_harmless() {
        assert_eq!(printable(" a\n\n b\t\u{1b}[2J ", 80), "a b \\u{1b}[2J");
        assert_eq!(printable("abcdef", 4), "abc…");
        assert_eq!(printable("é\u{0}\u{0}", 8), "é\\u{0}…");
        assert!(printable(&"\u{1b}".repeat(10_000), 100).chars().count() <= 100);
    }
}
