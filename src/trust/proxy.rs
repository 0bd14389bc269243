//! Reads the engine's proxy from `/etc/mco/proxy.env`. Pure.
//!
//! `EnvironmentFile=` is not used because it would set every variable in that file, also `LD_PRELOAD` and the agent's own
//! options.

/// Where MCO writes the cluster's proxy, below `/etc`.
pub const PROXY_FILE: &str = "mco/proxy.env";
/// Largest such file read, in bytes. `NO_PROXY` may have some kilobytes of networks and names.
pub const MAX_PROXY_FILE: u64 = 64 << 10;
/// The variables that skopeo uses.
pub const PROXY_VARIABLES: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];

/// The proxy's variables in the file, which has the format of `EnvironmentFile=` in systemd.exec(5): one variable per
/// line, with or without quotes. The last setting of a variable counts. A value with control characters is ignored.
#[must_use]
pub fn variables(text: &str) -> Vec<(&'static str, &str)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let settings: Vec<_> = lines.filter_map(|line| line.split_once('=')).collect();
    let last = |name: &'static str| {
        let (_, value) = settings.iter().rfind(|(key, _)| key.trim() == name)?;
        let value = unquoted(value.trim());
        (!value.contains(char::is_control)).then_some((name, value))
    };
    PROXY_VARIABLES.into_iter().filter_map(last).collect()
}

/// The fault of a proxy's URL, without the URL, which may contain a password. The engine treats a host without a scheme
/// as HTTP. It ignores a URL that it cannot parse, or connects to a wrong host.
#[must_use]
pub fn fault(url: &str) -> Option<&'static str> {
    const SCHEMES: [&str; 4] = ["http", "https", "socks5", "socks5h"];
    if url.is_empty() {
        return None;
    }
    let is_escape = |part: &str| part.get(..2).is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    if !url.split('%').skip(1).all(is_escape) {
        return Some("it has a raw `%`");
    }
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    if !SCHEMES.contains(&scheme) {
        return Some("its scheme is not http, https or socks5");
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    if rest.get(end..).is_some_and(|behind| behind.contains('@')) {
        return Some("it has a raw `#`, `/` or `?` before the `@`");
    }
    let parsed = reqwest::Url::parse(&format!("http://{rest}"));
    (!parsed.is_ok_and(|url| url.has_host())).then_some("it is not a URL")
}

fn unquoted(value: &str) -> &str {
    let inner = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_proxys_variables_are_taken() {
        let text = "# by MCO\n; too\nHTTP_PROXY=http://old\nHTTP_PROXY=http://p:3128\n https_proxy = \"http://q\"\n\
                    NO_PROXY='.cluster.local,10.0.0.0/16'\nLD_PRELOAD=/x.so\nREBASE_AGENT_POLICY=/x\nPATH=/x\n\
                    no_proxy=a\u{7}b\nexport HTTPS_PROXY=x\nnothing\n=\n";
        assert_eq!(
            variables(text),
            [("HTTP_PROXY", "http://p:3128"), ("NO_PROXY", ".cluster.local,10.0.0.0/16"), ("https_proxy", "http://q")]
        );
        assert_eq!(variables("HTTP_PROXY=\"\nHTTPS_PROXY=\n"), [("HTTP_PROXY", "\""), ("HTTPS_PROXY", "")]);
    }

    #[test]
    fn urls_that_the_engine_would_misread_are_faulty() {
        for good in ["", "http://p:3128", "p:3128", "https://u:a%23b@p.example/", "socks5://[::1]:1080", "http://p/x?y"]
        {
            assert_eq!(fault(good), None, "{good}");
        }
        for (bad, why) in [
            ("http://u:a%b@p:1", "a raw `%`"),
            ("http://u:a%", "a raw `%`"),
            ("http://u:a#b@p:1", "a raw `#`"),
            ("u:a/b@p:1", "a raw `#`, `/`"),
            ("http://u:a?b@p:1", "or `?` before"),
            ("ftp://p:1", "scheme"),
            ("http://p:x", "not a URL"),
            ("http://", "not a URL"),
        ] {
            assert!(fault(bad).is_some_and(|said| said.contains(why)), "{bad}: {:?}", fault(bad));
        }
    }
}
