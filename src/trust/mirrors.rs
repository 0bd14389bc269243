//! The mirrors of an image by `registries.conf`. Pure.
//!
//! For messages only: the engine reads the file itself. Lines that this parser does not understand are ignored.

/// Largest of these files read, in bytes.
pub const MAX_CONF: u64 = 1 << 20;

/// One `[[registry]]`.
#[derive(Default)]
struct Registry {
    prefix: String,
    location: String,
    mirrors: Vec<Mirror>,
}

/// One `[[registry.mirror]]`.
#[derive(Default)]
struct Mirror {
    location: String,
    /// The mirror is not used for a digest, which all our images have.
    tag_only: bool,
}

/// The mirrors of `name` (`host/repository`), in the order of their use. `conf` is `registries.conf` followed by the
/// files of `registries.conf.d`; a later file overrides an earlier one.
#[must_use]
pub fn mirrors(conf: &str, name: &str) -> Vec<String> {
    let mut registries: Vec<Registry> = Vec::new();
    let mut in_mirror = false;
    for line in conf.lines().map(str::trim) {
        match line {
            "[[registry]]" => {
                registries.push(Registry::default());
                in_mirror = false;
            }
            "[[registry.mirror]]" => {
                in_mirror = true;
                if let Some(registry) = registries.last_mut() {
                    registry.mirrors.push(Mirror::default());
                }
            }
            _ => {
                let (Some(registry), Some((key, value))) = (registries.last_mut(), setting(line)) else { continue };
                match (registry.mirrors.last_mut().filter(|_| in_mirror), key) {
                    (Some(mirror), "location") => value.clone_into(&mut mirror.location),
                    (Some(mirror), "pull-from-mirror") => mirror.tag_only = value == "tag-only",
                    (None, "prefix") => value.clone_into(&mut registry.prefix),
                    (None, "location") => value.clone_into(&mut registry.location),
                    _ => {}
                }
            }
        }
    }
    let rest = |registry: &Registry| {
        let prefix = if registry.prefix.is_empty() { &registry.location } else { &registry.prefix };
        let rest = name.strip_prefix(prefix.as_str())?;
        (!prefix.is_empty() && (rest.is_empty() || rest.starts_with('/'))).then(|| rest.to_owned())
    };
    // The longest prefix; of equal ones the last.
    let chosen = registries.iter().rev().filter_map(|registry| Some((registry, rest(registry)?)));
    let chosen = chosen.min_by_key(|(_, rest)| rest.len());
    chosen.map_or_else(Vec::new, |(registry, rest)| {
        let asked = registry.mirrors.iter().filter(|mirror| !mirror.tag_only && !mirror.location.is_empty());
        asked.map(|mirror| format!("{}{rest}", mirror.location)).collect()
    })
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
