//! RFC 3339 times, as in API objects, image configs and options. Pure.

use openssl::asn1::Asn1Time;

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const SHAPE: &[u8; 19] = b"0000-00-00T00:00:00";

/// Parses `2026-08-22T10:00:00Z`, optionally with a fraction of a second and an offset, to milliseconds since the epoch.
/// `None` for any other text, a leap second or a time before 1970, such as Go's zero time in the year 1.
#[must_use]
pub fn unix(text: &str) -> Option<u64> {
    let (date, rest) = text.split_at_checked(SHAPE.len())?;
    let fits = |(byte, shape): (u8, &u8)| match shape {
        b'0' => byte.is_ascii_digit(),
        shape => byte.eq_ignore_ascii_case(shape),
    };
    if !date.bytes().zip(SHAPE).all(fits) {
        return None;
    }
    let digits: String = date.chars().filter(char::is_ascii_digit).collect();
    let time = Asn1Time::from_str(&format!("{digits}Z")).ok()?;
    let since = Asn1Time::from_unix(0).ok()?.diff(&time).ok()?;
    let seconds = i64::from(since.days).checked_mul(86_400)?.checked_add(i64::from(since.secs))?;
    let (fraction, zone) = fraction(rest)?;
    let offset = if zone.eq_ignore_ascii_case("Z") { 0 } else { offset(zone)? };
    let seconds = seconds.checked_sub(offset.checked_mul(60)?)?;
    u64::try_from(seconds).ok()?.checked_mul(1000)?.checked_add(fraction)
}

/// Parses a fraction of a second to milliseconds, and returns the rest of the text.
fn fraction(text: &str) -> Option<(u64, &str)> {
    let Some(text) = text.strip_prefix('.') else { return Some((0, text)) };
    let (digits, zone) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit())?)?;
    if digits.is_empty() {
        return None;
    }
    let milliseconds: String = digits.chars().chain("000".chars()).take(3).collect();
    Some((milliseconds.parse().ok()?, zone))
}

/// Parses `+01:30` or `-01:30` to minutes.
fn offset(zone: &str) -> Option<i64> {
    let two = |text: &str, limit: i64| {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|value: &i64| digits && *value < limit)
    };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let total = two(hours, 24)?.checked_mul(60)?.checked_add(two(minutes, 60)?)?;
    match zone.as_bytes().first()? {
        b'+' => Some(total),
        b'-' => total.checked_neg(),
        _ => None,
    }
}

/// Formats milliseconds since the epoch as `2026-08-22T10:00:00Z`, without the fraction.
#[must_use]
pub fn text(unix: u64) -> String {
    let time = i64::try_from(unix / 1000).ok().and_then(|seconds| Asn1Time::from_unix(seconds).ok());
    // OpenSSL prints `Aug 22 10:00:00 2026 GMT`.
    let printed = time.map(|time| time.to_string()).unwrap_or_default();
    match printed.split_whitespace().collect::<Vec<_>>().as_slice() {
        [month, day, clock, year, ..] => {
            let month = MONTHS.iter().position(|name| name == month).map_or(0, |index| index.saturating_add(1));
            format!("{year}-{month:02}-{day:0>2}T{clock}Z")
        }
        _ => format!("{unix} ms after 1970"),
    }
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
    fn times_are_printed_as_they_are_given() {
        for given in ["1970-01-01T00:00:00Z", "2026-11-02T08:07:06Z", "2024-02-29T23:59:59Z"] {
            assert_eq!(text(unix(given).unwrap()), given);
        }
        assert!(text(u64::MAX).contains("ms after 1970"));
    }
}
