//! Tests that this machine cannot run.

use std::io::Write as _;

/// Prints that a test, or a part of it, is skipped, with the cause `missing`; the output is not captured.
///
/// # Panics
/// With `CI=true`, because skips are forbidden there.
#[track_caller]
pub fn skip(missing: &str) {
    skip_where(std::env::var("CI").is_ok_and(|ci| ci == "true"), missing);
}

#[track_caller]
fn skip_where(forbidden: bool, missing: &str) {
    assert!(!forbidden, "with CI=true no test is skipped, but {missing}");
    let _ = writeln!(std::io::stderr(), "SKIPPED: {missing}");
}

#[test]
#[should_panic(expected = "with CI=true no test is skipped, but this is the test of skipping")]
fn skip_fails_in_ci() {
    skip_where(true, "this is the test of skipping");
}
