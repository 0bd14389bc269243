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
}
