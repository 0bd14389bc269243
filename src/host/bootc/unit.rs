//! The names of the units that pull and switch. The instance name is the image reference, escaped as
//! systemd-escape(1) does. Pure.
//!
//! There are two templates for each task because the instance name cannot switch an option on, and the agent writes no drop-in that
//! could. The journal shows which one ran.

use super::super::HostError;
use crate::model::PinnedImage;
use crate::trust::{VerifiedImage, reference};

/// `bootc switch`, for policies whose default accepts any image: bootc refuses `--enforce-container-sigpolicy` there.
const PLAIN: &str = "rebase-agent-bootc@";
/// `bootc switch --enforce-container-sigpolicy`: the origin of the new deployment requires a signature.
const SIGNED: &str = "rebase-agent-bootc-signed@";
/// `ostree container image pull` without and with the prefix that requires a signature.
const PULL: &str = "rebase-agent-pull@";
const PULL_SIGNED: &str = "rebase-agent-pull-signed@";
const SUFFIX: &str = ".service";
/// Match every instance of the templates.
pub(super) const PATTERNS: [&str; 4] = [
    "rebase-agent-bootc@*.service",
    "rebase-agent-bootc-signed@*.service",
    "rebase-agent-pull@*.service",
    "rebase-agent-pull-signed@*.service",
];
/// Longest unit name: systemd's `UNIT_NAME_MAX` without the terminating zero.
const LONGEST: usize = 255;

/// The task of a unit.
#[derive(Clone, Copy)]
pub(super) enum Task {
    Pull,
    Switch,
}

/// The unit that does `task` with `image`.
///
/// # Errors
/// [`HostError::NameTooLong`].
pub(super) fn of(task: Task, image: &VerifiedImage) -> Result<String, HostError> {
    name(task, image.image(), image.is_signed_origin())
}

fn name(task: Task, image: &PinnedImage, signed: bool) -> Result<String, HostError> {
    let prefix = match (task, signed) {
        (Task::Switch, false) => PLAIN,
        (Task::Switch, true) => SIGNED,
        (Task::Pull, false) => PULL,
        (Task::Pull, true) => PULL_SIGNED,
    };
    let name = format!("{prefix}{}{SUFFIX}", escape(&image.to_string()));
    match name.len() {
        0..=LONGEST => Ok(name),
        length => Err(HostError::NameTooLong { image: image.clone(), length, longest: LONGEST }),
    }
}

/// The image that one of our units pulls or switches to; `None` for any other unit, and for an instance that names no image.
#[must_use]
pub fn image(unit: &str) -> Option<PinnedImage> {
    let instance =
        [PLAIN, SIGNED, PULL, PULL_SIGNED].iter().find_map(|prefix| unit.strip_prefix(prefix))?.strip_suffix(SUFFIX)?;
    reference::parse(&unescape(instance)?).ok()
}

/// Escapes as systemd-escape(1): `/` becomes `-`; letters, digits, `:`, `_` and inner dots stay; all else becomes `\xNN`.
/// The result has no white space, quote, `$` or `%`. An image reference does not begin with `/`, so its result does not
/// begin with a dash.
fn escape(text: &str) -> String {
    let escaped = |(index, byte): (usize, u8)| match byte {
        b'/' => "-".to_owned(),
        b'.' if index == 0 => "\\x2e".to_owned(),
        b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b':' | b'_' | b'.' => char::from(byte).to_string(),
        byte => format!("\\x{byte:02x}"),
    };
    text.bytes().enumerate().map(escaped).collect()
}

fn unescape(instance: &str) -> Option<String> {
    let slashes = instance.replace('-', "/");
    let mut parts = slashes.split("\\x");
    let mut out = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        out.push(u8::from_str_radix(digits, 16).ok()?);
        out.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn pinned(name: &str) -> PinnedImage {
        reference::parse(&format!("{name}@sha256:{HEX}")).unwrap()
    }

    #[test]
    fn names_are_as_systemd_escapes_them() {
        let expected = format!("rebase-agent-bootc@quay.io-example-os\\x2dimage\\x40sha256:{HEX}.service");
        assert_eq!(name(Task::Switch, &pinned("quay.io/example/os-image"), false).unwrap(), expected);
        let signed = name(Task::Switch, &pinned("127.0.0.1:5000/a_b/c"), true).unwrap();
        assert_eq!(signed, format!("rebase-agent-bootc-signed@127.0.0.1:5000-a_b-c\\x40sha256:{HEX}.service"));
    }

    #[test]
    fn escaping_equals_systemd_escape() {
        for text in ["quay.io/o/i@sha256:00", "-x", ".hidden", "a--b", "%i", "$HOME", "a b'\"\\", "é", "UPPER_1:2"] {
            let Ok(told) = Command::new("systemd-escape").arg("--").arg(text).output() else {
                return crate::skip::skip("systemd-escape is not installed, so its escaping is not compared");
            };
            assert_eq!(String::from_utf8(told.stdout).unwrap().trim_end(), escape(text), "{text}");
        }
    }

    #[test]
    fn a_name_over_the_limit_is_refused_with_its_length() {
        // `@sha256:` and the digest take 75 characters.
        let room = LONGEST - PLAIN.len() - SUFFIX.len() - "quay.io/".len() - 75;
        assert_eq!(
            name(Task::Switch, &pinned(&format!("quay.io/{}", "a".repeat(room))), false).unwrap().len(),
            LONGEST
        );
        let error = name(Task::Switch, &pinned(&format!("quay.io/{}", "a".repeat(room + 1))), false).unwrap_err();
        assert!(matches!(error, HostError::NameTooLong { length: 256, .. }), "{error}");
        assert_eq!(error.reason().severity(), crate::model::Severity::Fatal);
        assert!(
            name(Task::Switch, &pinned(&format!("quay.io/{}", "a".repeat(room))), true).is_err(),
            "its prefix is longer"
        );
    }

    #[test]
    fn only_our_own_units_have_an_image() {
        for signed in [false, true] {
            let image = pinned("localhost:5000/a-b/c.d__e");
            assert_eq!(super::image(&name(Task::Switch, &image, signed).unwrap()), Some(image));
        }
        let foreign = [
            "rebase-agent-bootc@.service",
            "rebase-agent-bootc@quay.io-o-i.service",
            "rebase-agent-bootc@\\x2d\\x2dapply.service",
            "rebase-agent-bootc@\\xé.service",
            "rebase-agent-bootc@\\x+1.service",
            "rebase-agent-bootc@\\.service",
            "rebase-agent-bootc-status@1-2-0.service",
            "rebase-agent.service",
        ];
        for unit in foreign {
            assert_eq!(super::image(unit), None, "{unit}");
        }
    }

    proptest::proptest! {
        #[test]
        fn escaping_is_reversible_and_leaves_no_special_character(text in ".{0,40}") {
            let escaped = escape(&text);
            let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b':' | b'_' | b'.' | b'-' | b'\\');
            proptest::prop_assert!(escaped.bytes().all(safe), "{}", escaped);
            proptest::prop_assert_eq!(unescape(&escaped), Some(text));
        }

        #[test]
        fn every_accepted_reference_gives_a_unit_name(host in "[a-z0-9.-]{1,20}(:[0-9]{1,5})?", path in "[a-z0-9/._-]{1,80}") {
            if let Ok(image) = reference::parse(&format!("{host}/{path}@sha256:{HEX}")) {
                let Ok(name) = name(Task::Switch, &image, false) else { return Ok(()) };
                let instance = name.strip_prefix(PLAIN).unwrap();
                proptest::prop_assert!(instance.starts_with(|c: char| c.is_ascii_alphanumeric()), "{}", instance);
                proptest::prop_assert_eq!(super::image(&name), Some(image));
            }
        }
    }
}
