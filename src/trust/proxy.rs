//! Which proxy the engine goes through: the variables of `/etc/mco/proxy.env`, and no others. Pure.
//!
//! `EnvironmentFile=` would take every variable from that file, `LD_PRELOAD` and the agent's own options among them.

/// Where MCO writes the cluster's proxy, below `/etc`.
pub const PROXY_FILE: &str = "mco/proxy.env";
/// Largest such file read, in bytes. `NO_PROXY` lists networks and names, some kilobytes of them.
pub const MAX_PROXY_FILE: u64 = 64 << 10;
/// The names that skopeo knows.
pub const PROXY_VARIABLES: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];

/// The proxy's variables in the file, which is written as for `EnvironmentFile=` of systemd.exec(5): a variable a line,
/// its value with or without quotes. Of two settings the last counts; a value with control characters is left out.
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

/// What is wrong with a proxy's URL, which is never shown: it may hold a password. The engine takes a host without a
/// scheme for HTTP. A URL that it does not understand it passes over, or asks a host that is none.
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
        return Some("its scheme is none of http, https and socks5");
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    if rest.get(end..).is_some_and(|behind| behind.contains('@')) {
        return Some("it has a raw `#`, `/` or `?` before the `@`");
    }
    let parsed = reqwest::Url::parse(&format!("http://{rest}"));
    (!parsed.is_ok_and(|url| url.has_host())).then_some("it does not parse")
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
            ("http://p:x", "does not parse"),
            ("http://", "does not parse"),
        ] {
            assert!(fault(bad).is_some_and(|said| said.contains(why)), "{bad}: {:?}", fault(bad));
        }
    }
}
