//! Image references: every accepted reference has one canonical spelling that all tools read the same.
#![no_main]

use fuzz::{bounded, shown};
use libfuzzer_sys::fuzz_target;
use rebase_agent::trust::reference::{name_of, of_deployment, parse, to_pull};

fuzz_target!(|text: &str| {
    match bounded(text.len(), 16, || parse(text)) {
        Ok(image) => {
            let spelt = image.to_string();
            assert_eq!(parse(&spelt).as_ref(), Ok(&image));
            assert!(spelt.starts_with(|c: char| c.is_ascii_alphanumeric()));
            assert!(spelt.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/@-".contains(&b)), "{spelt}");
            assert_eq!(name_of(&spelt), image.name());
            assert_eq!(spelt.rsplit_once('@'), Some((image.name(), image.digest().as_str())));
            for insecure in [false, true] {
                assert_eq!(of_deployment(&to_pull(&image, insecure)).as_ref(), Some(&spelt));
            }
        }
        Err(error) => shown(&error.to_string(), 700),
    }
    // The host reports free text; the agent keeps only a part of it.
    if let Some(name) = bounded(text.len(), 16, || of_deployment(text)) {
        assert!(text.ends_with(&name), "{name}");
    }
    let name = name_of(text);
    assert!(text.starts_with(name) && !name.contains('@'), "{name}");
});
