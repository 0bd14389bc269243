//! The mirrors of an image by `registries.conf`. Pure.
//!
//! For messages only: the engine reads the file itself. Lines that this parser does not understand are ignored.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Largest of these files read, in bytes.
pub const MAX_CONF: u64 = 1 << 20;

/// A table's header and its settings.
type Table<'a> = (&'a str, BTreeMap<&'a str, &'a str>);

/// The mirrors of `name` (`host/repository`), in the order of their use. `conf` is `registries.conf` followed by the
/// files of `registries.conf.d`; a later file overrides an earlier one.
#[must_use]
pub fn mirrors(conf: &str, name: &str) -> Vec<String> {
    let mut tables: Vec<Table<'_>> = Vec::new();
    for line in conf.lines().map(str::trim) {
        if line.starts_with('[') {
            tables.push((line, BTreeMap::new()));
        } else if let (Some((_, table)), Some((key, value))) = (tables.last_mut(), setting(line)) {
            table.insert(key, value);
        }
    }
    let registries = tables.chunk_by(|_, (header, _)| *header == "[[registry.mirror]]");
    let applying = registries.filter_map(|tables| {
        let ((header, registry), mirrors) = tables.split_first()?;
        let given = |key: &str| registry.get(key).filter(|value| !value.is_empty());
        let rest = name.strip_prefix(given("prefix").or(given("location"))?)?;
        (*header == "[[registry]]" && (rest.is_empty() || rest.starts_with('/'))).then_some((mirrors, rest))
    });
    // The longest prefix; of equal ones the last.
    let (mirrors, rest) = applying.max_by_key(|(_, rest)| Reverse(rest.len())).unwrap_or_default();
    // Our images all have a digest, for which a mirror of tags is not used.
    let mirrors = mirrors.iter().filter(|(_, mirror)| mirror.get("pull-from-mirror") != Some(&"tag-only"));
    let locations = mirrors.filter_map(|(_, mirror)| mirror.get("location").filter(|location| !location.is_empty()));
    locations.map(|location| format!("{location}{rest}")).collect()
}

/// Parses `key = "value"`, with or without a comment after it.
fn setting(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (value, _) = value.trim().strip_prefix('"')?.split_once('"')?;
    Some((key.trim(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_names_the_mirrors() {
        let conf = r#"
            unqualified-search-registries = ["docker.io"]
            [[registry]]
            prefix = "quay.example"
            location = "quay.example"
            [[registry.mirror]]
            location = "m0.example"
            [[registry]]
            prefix = ""
            location = "quay.example/team" # the prefix is this, too
            blocked = true
            [[registry.mirror]]
            location = "m1.example/a"
            pull-from-mirror = "digest-only"
            [[registry.mirror]]
            location = "m2.example"
            insecure = true
            [[registry.mirror]]
            pull-from-mirror = "tag-only"
            location = "tags.example"
        "#;
        assert_eq!(mirrors(conf, "quay.example/team/os"), ["m1.example/a/os", "m2.example/os"]);
        assert_eq!(mirrors(conf, "quay.example/teams/os"), ["m0.example/teams/os"]);
        let later = format!("{conf}\n[[registry]]\nlocation = \"quay.example/team\"\n");
        assert!(mirrors(&later, "quay.example/team/os").is_empty());
        for nothing in ["", "location = \"x\"", "[[registry.mirror]]\nlocation = \"m\"", "[[registry]]\nprefix = 1"] {
            assert!(mirrors(nothing, "quay.example/team/os").is_empty(), "{nothing}");
        }
    }
}
