//! libostree's record of the staged deployment, `/run/ostree/staged-deployment`: a GVariant `a{sv}` that exists until the
//! deployment is finalized. The agent reads it because rpm-ostreed aborts when it is asked for the arguments of a
//! deployment that was staged without any, and does not show that a deployment is locked.

use gvariant::aligned_bytes::copy_to_align;
use gvariant::{Marker as _, Structure as _, gv};

use super::boot::Root;
use crate::files::read_bounded;

/// The record.
const NOTE: &str = "run/ostree/staged-deployment";
/// An older libostree locks the staged deployment with this file instead of the record's `locked`.
const LOCK: &str = "run/ostree/staged-deployment-locked";
/// Largest record read, in bytes.
const MAX_NOTE: u64 = 1 << 20;

/// The parsed record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// `<osname>-<checksum>.<serial>`; `None` if the record does not name its deployment.
    pub id: Option<String>,
    /// The arguments that the deployment was staged with; `None` if it was staged without any.
    pub arguments: Option<Vec<String>>,
    /// The deployment is not finalized at shutdown.
    pub locked: bool,
}

/// Reads the record of deployment `id`; `None` if there is none, or it is of another deployment.
pub(super) fn read(root: &Root, id: &str) -> Option<Note> {
    let note = read_bounded(&root.join(NOTE), MAX_NOTE).ok().map(|bytes| parse(&bytes));
    let note = note.filter(|note| note.id.as_deref().is_none_or(|named| named == id))?;
    let locked = note.locked || root.join(LOCK).exists();
    Some(Note { locked, ..note })
}

/// An entry that is missing, damaged or of an unexpected type counts as absent. Pure.
#[must_use]
pub fn parse(note: &[u8]) -> Note {
    let note = copy_to_align(note);
    let mut parsed = Note::default();
    for (key, value) in gv!("a{sv}").cast(note.as_ref()).iter().map(|entry| entry.to_tuple()) {
        match key.to_str() {
            "kargs" => {
                let list = value.get(gv!("as"));
                parsed.arguments = list.map(|list| list.iter().map(|argument| argument.to_str().to_owned()).collect());
            }
            "locked" => parsed.locked = value.get(gv!("b")).is_some_and(|locked| locked.to_bool()),
            "target" => {
                let entries = value.get(gv!("a{sv}"));
                let text = |wanted: &str| {
                    let (_, value) =
                        entries?.iter().map(|entry| entry.to_tuple()).find(|(key, _)| key.to_str() == wanted)?;
                    Some(value.get(gv!("s"))?.to_str())
                };
                // `name` is `<checksum>.<serial>`.
                parsed.id = text("osname").zip(text("name")).map(|(osname, name)| format!("{osname}-{name}"));
            }
            _ => {}
        }
    }
    parsed
}

#[cfg(test)]
mod tests {
    use ostree_ext::glib::prelude::ToVariant;
    use ostree_ext::glib::{Variant, VariantDict};
    use proptest::prelude::*;

    use super::*;

    /// A record as libostree writes it, with more entries than the agent reads.
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
        parse(note).arguments
    }

    proptest! {
        #[test]
        fn records_that_glib_writes_are_read(kargs in prop::collection::vec("[^\0]{0,300}", 0..60), locked in any::<Option<bool>>()) {
            let note = parse(&written(Some(&kargs.to_variant()), locked));
            prop_assert_eq!(note.arguments, Some(kargs));
            prop_assert_eq!(note.locked, locked.unwrap_or(false));
            prop_assert_eq!(note.id, Some(format!("default-{}.0", "1".repeat(64))));
        }

        #[test]
        fn damaged_records_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), at in any::<usize>(), to in any::<u8>()) {
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
    fn the_record_of_another_deployment_is_ignored() {
        let tree = tempfile::tempdir().unwrap();
        let root = Root::new(tree.path().to_owned());
        let id = format!("default-{}.0", "1".repeat(64));
        assert_eq!(read(&root, &id), None);
        std::fs::create_dir_all(root.join("run/ostree")).unwrap();
        std::fs::write(root.join(NOTE), written(Some(&vec!["rw"].to_variant()), None)).unwrap();
        let note = read(&root, &id).unwrap();
        assert_eq!((note.arguments, note.locked), (Some(vec!["rw".to_owned()]), false));
        assert_eq!(read(&root, "default-3.0"), None);
        // An older libostree keeps the lock in a separate file.
        std::fs::write(root.join(LOCK), "").unwrap();
        assert!(read(&root, &id).unwrap().locked);
    }
}
