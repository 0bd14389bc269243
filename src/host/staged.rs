//! libostree's note on the staged deployment, `/run/ostree/staged-deployment`: a GVariant `a{sv}` that is there until the
//! deployment is finalized. It says more than the host tools do: rpm-ostreed aborts when it is asked for the arguments
//! of a deployment that was staged without any, and does not show that one is locked. Reads that much of the format
//! and no more.

use super::boot::Root;
use crate::files::read_bounded;

/// The note.
const NOTE: &str = "run/ostree/staged-deployment";
/// Locks a staged deployment whose note says nothing of a lock: an older libostree knows only this file.
const LOCK: &str = "run/ostree/staged-deployment-locked";
/// Largest note read, in bytes.
const MAX_NOTE: u64 = 1 << 20;

/// What the note says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Note {
    /// `<osname>-<checksum>.<serial>`; `None` for a note that does not name its deployment.
    pub id: Option<String>,
    /// The arguments that the deployment was staged with; `None` if it was staged without any.
    pub arguments: Option<Vec<String>>,
    /// Left out at shutdown.
    pub locked: bool,
}

/// The note on deployment `id`; `None` if there is none, it is damaged, or it is about another deployment.
pub(super) fn read(root: &Root, id: &str) -> Option<Note> {
    let note = read_bounded(&root.join(NOTE), MAX_NOTE).ok().and_then(|bytes| parse(&bytes));
    let note = note.filter(|note| note.id.as_deref().is_none_or(|named| named == id))?;
    let locked = note.locked || root.join(LOCK).exists();
    Some(Note { locked, ..note })
}

/// `None` for what is no such note. An entry of an unexpected type counts as absent. Pure.
pub(super) fn parse(note: &[u8]) -> Option<Note> {
    let mut parsed = Note::default();
    for (key, data, kind) in dictionary(note)? {
        match (key, kind) {
            (b"kargs", b"as") => {
                parsed.arguments = Some(array(data, 1)?.into_iter().map(string).collect::<Option<_>>()?);
            }
            (b"locked", b"b") => parsed.locked = data == [1],
            (b"target", b"a{sv}") => parsed.id = target(data),
            _ => {}
        }
    }
    Some(parsed)
}

/// The deployment that `target` names: `name` is `<checksum>.<serial>`.
fn target(bytes: &[u8]) -> Option<String> {
    let entries = dictionary(bytes)?;
    let text = |wanted: &[u8]| {
        entries.iter().find(|(key, _, kind)| *key == wanted && *kind == b"s").and_then(|(_, data, _)| string(data))
    };
    Some(format!("{}-{}", text(b"osname")?, text(b"name")?))
}

/// An entry of an `a{sv}`: key, data, and type of the data.
type Entry<'a> = (&'a [u8], &'a [u8], &'a [u8]);

fn dictionary(bytes: &[u8]) -> Option<Vec<Entry<'_>>> {
    let entry = |bytes| {
        let (key, value) = pair(bytes)?;
        let (data, kind) = variant(value)?;
        Some((key, data, kind))
    };
    array(bytes, 8)?.into_iter().map(entry).collect()
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
    fn written(kargs: Option<&Variant>, locked: Option<bool>) -> Vec<u8> {
        let target = VariantDict::new(None);
        target.insert("name", format!("{}.0", "1".repeat(64)));
        target.insert("osname", "default");
        target.insert("bootcsum", "2".repeat(64));
        let dict = VariantDict::new(None);
        dict.insert_value("target", &target.end());
        if let Some(kargs) = kargs {
            dict.insert_value("kargs", kargs);
        }
        if let Some(locked) = locked {
            dict.insert("locked", locked);
        }
        dict.end().data().to_vec()
    }

    fn arguments(note: &[u8]) -> Option<Vec<String>> {
        parse(note)?.arguments
    }

    proptest! {
        #[test]
        fn reads_what_glib_writes(kargs in prop::collection::vec("[^\0]{0,300}", 0..60), locked in any::<Option<bool>>()) {
            let note = parse(&written(Some(&kargs.to_variant()), locked)).unwrap();
            prop_assert_eq!(note.arguments, Some(kargs));
            prop_assert_eq!(note.locked, locked.unwrap_or(false));
            prop_assert_eq!(note.id, Some(format!("default-{}.0", "1".repeat(64))));
        }

        #[test]
        fn damage_is_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), at in any::<usize>(), to in any::<u8>()) {
            let _ = parse(&bytes);
            let mut written = written(Some(&vec!["root=UUID=1", "rw"].to_variant()), Some(true));
            let at = at % written.len();
            written[at] = to;
            let _ = parse(&written);
        }
    }

    #[test]
    fn only_a_list_of_strings_counts() {
        assert_eq!(arguments(&written(None, None)), None);
        assert_eq!(arguments(&written(Some(&"rw".to_variant()), None)), None);
        assert_eq!(arguments(&written(Some(&Vec::<String>::new().to_variant()), None)), Some(Vec::new()));
        assert_eq!(arguments(b""), None);
        assert_eq!(arguments(&[0; 100_000]), None);
    }

    #[test]
    fn a_note_on_another_deployment_says_nothing_of_this_one() {
        let tree = tempfile::tempdir().unwrap();
        let root = Root::new(tree.path().to_owned());
        let id = format!("default-{}.0", "1".repeat(64));
        assert_eq!(read(&root, &id), None);
        std::fs::create_dir_all(root.join("run/ostree")).unwrap();
        std::fs::write(root.join(NOTE), written(Some(&vec!["rw"].to_variant()), None)).unwrap();
        let note = read(&root, &id).unwrap();
        assert_eq!((note.arguments, note.locked), (Some(vec!["rw".to_owned()]), false));
        assert_eq!(read(&root, "default-3.0"), None);
        // The lock of an older libostree is a file beside it.
        std::fs::write(root.join(LOCK), "").unwrap();
        assert!(read(&root, &id).unwrap().locked);
    }
}
