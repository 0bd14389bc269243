//! Makes foreign text safe to print. Pure; [`crate::model`] re-exports it.

/// Makes foreign text safe to print: escapes control and invisible characters, joins runs of white space, and cuts the text
/// before `max` characters with an ellipsis. Errors of registries and daemons may contain newlines and terminal escapes.
#[must_use]
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::new();
    let mut length = 0;
    for c in text.trim().chars() {
        let before = out.len();
        match c {
            '\n' | '\r' | '\t' | ' ' if out.ends_with(' ') => {}
            '\n' | '\r' | '\t' => out.push(' '),
            c if c.is_control() || is_invisible(c) => out.extend(c.escape_unicode()),
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

/// Whether a terminal shows no glyph for the character, or changes the characters beside it, so that a text looks different
/// from its content. These are the ranges of Unicode 16.0 with category Cf (format), Zl, Zp (separators of lines), Co
/// (private use) or property `Default_Ignorable_Code_Point`, and the noncharacters.
fn is_invisible(c: char) -> bool {
    matches!(c,
        // Soft hyphen, grapheme joiner, Arabic number signs and letter mark.
        '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
        // Hangul fillers, Khmer vowels that are not shown, Mongolian separators.
        | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
        // Zero width, marks and embeddings of direction, separators of lines; word joiner and isolates.
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{3164}' | '\u{e000}'..='\u{f8ff}' | '\u{fdd0}'..='\u{fdef}'
        // Variation selectors, byte order mark, half-width filler, annotations.
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
        // Format characters of Kaithi, hieroglyphs, shorthand and music.
        | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        // Tags, more variation selectors, planes for private use.
        | '\u{e0000}'..='\u{10ffff}')
        || u32::from(c) & 0xfffe == 0xfffe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_bounded_and_harmless() {
        assert_eq!(printable(" a\n\n b\t\u{1b}[2J ", 80), "a b \\u{1b}[2J");
        assert_eq!(printable("abcdef", 4), "abc…");
        assert_eq!(printable("é\u{0}\u{0}", 8), "é\\u{0}…");
        assert_eq!(printable("a\u{202e}b\u{200b}c\u{ad}", 80), "a\\u{202e}b\\u{200b}c\\u{ad}");
        assert!(printable(&"\u{1b}".repeat(10_000), 100).chars().count() <= 100);
    }

    #[test]
    fn nothing_invisible_is_printed_and_scripts_are() {
        let ranges = [
            0x200b..=0x200f,
            0x2028..=0x202e,
            0x2060..=0x206f,
            0xe000..=0xf8ff,
            0xfe00..=0xfe0f,
            0xfff9..=0xfffb,
            0xe0000..=0xe007f,
            0xfeff..=0xfeff,
            0x61c..=0x61c,
            0x10ffff..=0x10ffff,
        ];
        for c in ranges.into_iter().flatten().map(|c| char::from_u32(c).unwrap()) {
            assert_eq!(printable(&format!("a{c}b"), 80), format!("a{}b", c.escape_unicode()));
        }
        for text in ["Größe", "Ελληνικά", "עברית", "العربية", "हिन्दी", "日本語", "한국어", "…–“”", "😀"]
        {
            assert_eq!(printable(text, 80), text);
        }
    }
}
