//! RFC 3339 times, as in API objects, image configs and options. Pure.

use chrono::{DateTime, SecondsFormat};

/// Parses `2026-08-22T10:00:00Z`, optionally with a fraction of a second and an offset, to milliseconds since the epoch.
/// `None` for any other text or a time before 1970, such as Go's zero time in the year 1.
#[must_use]
pub fn unix(text: &str) -> Option<u64> {
    // Unlike the parser, RFC 3339 has no space between date and time.
    let time = DateTime::parse_from_rfc3339(text).ok().filter(|_| !text.contains(' '))?;
    u64::try_from(time.timestamp_millis()).ok()
}

/// Formats milliseconds since the epoch as `2026-08-22T10:00:00Z`, without the fraction.
#[must_use]
pub fn text(unix: u64) -> String {
    let time = i64::try_from(unix).ok().and_then(DateTime::from_timestamp_millis);
    time.map_or_else(|| format!("{unix} ms after 1970"), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_parsed() {
        for (given, expected) in [
            ("1970-01-01T00:00:01Z", 1000),
            ("2026-11-22T08:00:00Z", 1_795_334_400_000),
            ("2026-11-22t08:00:00z", 1_795_334_400_000),
            ("2026-11-22T08:00:00.5Z", 1_795_334_400_500),
            ("2026-11-22T08:00:00.123456789Z", 1_795_334_400_123),
            ("2026-11-22T09:30:00+01:30", 1_795_334_400_000),
            ("2026-11-21T20:00:00.000000001-12:00", 1_795_334_400_000),
            ("1969-12-31T23:30:00-01:00", 1_800_000),
        ] {
            assert_eq!(unix(given), Some(expected), "{given}");
        }
        for bad in [
            "",
            "Z",
            "2026-11-22",
            "2026-11-22T08:00:00",
            "2026-11-22 08:00:00Z",
            "2026-13-22T08:00:00Z",
            "2026-02-30T08:00:00Z",
            "2026-11-22T25:00:00Z",
            "2026-11-22T08:00:00.Z",
            "2026-11-22T08:00:00.5",
            "2026-11-22T08:00:00+0100",
            "2026-11-22T08:00:00+24:00",
            "2026-11-22T08:00:00+01:60",
            "2026-11-22T08:00:00++1:00",
            "2026-11-22T08:00:00ZZ",
            "2026-11-22T08:00:00é",
            "20261122T080000Z",
            "1969-12-31T23:59:59Z",
            "0001-01-01T00:00:00Z",
        ] {
            assert_eq!(unix(bad), None, "{bad}");
        }
    }

    #[test]
    fn printed_times_equal_the_parsed_ones() {
        for given in ["1970-01-01T00:00:00Z", "2026-11-02T08:07:06Z", "2024-02-29T23:59:59Z"] {
            assert_eq!(text(unix(given).unwrap()), given);
        }
        assert!(text(u64::MAX).contains("ms after 1970"));
    }
}
