//! The kernel arguments of the staged deployment: libostree keeps them in `/run/ostree/staged-deployment` until it is
//! finalized, as a GVariant `a{sv}` with `kargs` of type `as`. Reads that much of the format and no more. Pure.

/// The arguments that the deployment was staged with; `None` if it says nothing of them, or is damaged.
pub(in super::super) fn arguments(staged: &[u8]) -> Option<Vec<String>> {
    for entry in array(staged, 8)? {
        let (key, value) = pair(entry)?;
        if key == b"kargs" {
            let (data, kind) = variant(value)?;
            if kind != b"as" {
                return None;
            }
            return array(data, 1)?.into_iter().map(string).collect();
        }
    }
    None
}

/// Framing offsets are as wide as the container's size needs.
fn width(size: usize) -> usize {
    match size {
        0..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    }
}

/// The framing offset at `at`, always little-endian.
fn offset(bytes: &[u8], at: usize, width: usize) -> Option<usize> {
    let raw = bytes.get(at..at.checked_add(width)?)?;
    let value = raw.iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte));
    usize::try_from(value).ok()
}

/// The elements of an array of variable size: their ends are listed behind the last one.
fn array(bytes: &[u8], alignment: usize) -> Option<Vec<&[u8]>> {
    if bytes.is_empty() {
        return Some(Vec::new());
    }
    let width = width(bytes.len());
    let table = offset(bytes, bytes.len().checked_sub(width)?, width)?;
    let mut elements = Vec::new();
    let mut start: usize = 0;
    for at in (table..bytes.len()).step_by(width) {
        let end = offset(bytes, at, width)?;
        if end > table {
            return None;
        }
        elements.push(bytes.get(start.checked_next_multiple_of(alignment)?..end)?);
        start = end;
    }
    Some(elements)
}

/// A dictionary entry `{sv}`: the end of the key stands at the very end.
fn pair(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let width = width(bytes.len());
    let table = bytes.len().checked_sub(width)?;
    let end = offset(bytes, table, width)?;
    let key = bytes.get(..end)?.strip_suffix(b"\0")?;
    Some((key, bytes.get(end.checked_next_multiple_of(8)?..table)?))
}

/// The data and, behind the last zero, its type.
fn variant(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let zero = bytes.iter().rposition(|byte| *byte == 0)?;
    Some((bytes.get(..zero)?, bytes.get(zero.checked_add(1)?..)?))
}

fn string(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.strip_suffix(b"\0")?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use ostree_ext::glib::prelude::ToVariant;
    use ostree_ext::glib::{Variant, VariantDict};
    use proptest::prelude::*;

    use super::*;

    /// As libostree writes it: more than we need around it.
    fn written(kargs: Option<&Variant>) -> Vec<u8> {
        let dict = VariantDict::new(None);
        dict.insert_value("target", &("default", "1".repeat(64), 0_i32).to_variant());
        if let Some(kargs) = kargs {
            dict.insert_value("kargs", kargs);
        }
        dict.insert("locked", false);
        dict.end().data().to_vec()
    }

    proptest! {
        #[test]
        fn reads_what_glib_writes(kargs in prop::collection::vec("[^\0]{0,300}", 0..60)) {
            prop_assert_eq!(arguments(&written(Some(&kargs.to_variant()))), Some(kargs));
        }

        #[test]
        fn damage_is_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), at in any::<usize>(), to in any::<u8>()) {
            let _ = arguments(&bytes);
            let mut written = written(Some(&vec!["root=UUID=1", "rw"].to_variant()));
            let at = at % written.len();
            written[at] = to;
            let _ = arguments(&written);
        }
    }

    #[test]
    fn only_a_list_of_strings_counts() {
        assert_eq!(arguments(&written(None)), None);
        assert_eq!(arguments(&written(Some(&"rw".to_variant()))), None);
        assert_eq!(arguments(&written(Some(&Vec::<String>::new().to_variant()))), Some(Vec::new()));
        assert_eq!(arguments(b""), None);
        assert_eq!(arguments(&[0; 100_000]), None);
    }
}
