//! Kernel arguments: compared as the kernel parses them, in order and with repetition. Pure.
//!
//! The arguments of a rendered config follow the platform's own in one block, as with the MCD: on a change it deletes all
//! arguments of the old config and appends all of the new one (`generateKargs`). The platform's arguments stay, also if a
//! config demands the same argument. Then the boot entry has it twice.

use std::borrow::Cow;
use std::collections::BTreeSet;

/// Characters that boot loaders remove, add or move when they make the command line from the boot entry.
const REWRITTEN: &[char] = &['"', '\'', '\\', '$', ';', '|', '&', '<', '>', '{', '}'];

/// One argument, parsed as `next_arg` in the kernel's lib/cmdline.c does, and compared as `parameq` in kernel/params.c.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Parameter<'a> {
    name: Cow<'a, str>,
    value: Option<&'a str>,
}

impl<'a> Parameter<'a> {
    fn new(argument: &'a str) -> Self {
        let (body, quoted) = match argument.strip_prefix('"') {
            Some(body) => (body, true),
            None => (argument, false),
        };
        let unquoted = |text: &'a str| text.strip_suffix('"').unwrap_or(text);
        // An `=` at the start belongs to the name.
        let equals = body.char_indices().skip(1).find(|(_, c)| *c == '=').map(|(at, _)| at);
        let (name, value) = match equals.and_then(|at| body.split_at_checked(at)) {
            Some((name, rest)) => {
                let value = rest.strip_prefix('=').unwrap_or(rest);
                let value = match value.strip_prefix('"') {
                    Some(inner) => unquoted(inner),
                    None if quoted => unquoted(value),
                    None => value,
                };
                (name, Some(value))
            }
            None if quoted => (unquoted(body), None),
            None => (body, None),
        };
        let name = if name.contains('-') { Cow::Owned(name.replace('-', "_")) } else { Cow::Borrowed(name) };
        Self { name, value }
    }
}

fn parse(arguments: &[String]) -> Vec<Parameter<'_>> {
    arguments.iter().map(|argument| Parameter::new(argument)).collect()
}

/// Splits at white space outside double quotes, as the kernel does. The quotes are kept.
#[must_use]
pub fn split(text: &str) -> Vec<String> {
    let mut quoted = false;
    text.split(|c: char| {
        quoted ^= c == '"';
        // The kernel's isspace() includes the vertical tab.
        !quoted && (c.is_ascii_whitespace() || c == '\u{b}')
    })
    .filter(|argument| !argument.is_empty())
    .map(str::to_owned)
    .collect()
}

/// The first of `demanded` that is missing in `present`, compared in order and with repetition; `None` if none is.
#[must_use]
pub fn missing<'a>(demanded: &'a [String], present: &[String]) -> Option<&'a str> {
    first_missing(demanded.iter(), present)
}

fn first_missing<'a>(mut demanded: impl Iterator<Item = &'a String>, present: &[String]) -> Option<&'a str> {
    let present = parse(present);
    let mut present = present.iter();
    demanded
        .find(|argument| {
            let argument = Parameter::new(argument);
            !present.any(|there| *there == argument)
        })
        .map(String::as_str)
}

/// The first of `demanded` that the running kernel lacks in this order. For arguments that a boot loader rewrites, the
/// boot entry's arguments, `entry`, are compared instead.
#[must_use]
pub fn not_in_effect<'a>(demanded: &'a [String], command_line: &[String], entry: Option<&[String]>) -> Option<&'a str> {
    let missing_there = missing(demanded, command_line)?;
    if entry.is_some_and(|entry| missing(demanded, entry).is_none()) {
        return first_missing(demanded.iter().filter(|argument| !argument.contains(REWRITTEN)), command_line);
    }
    Some(missing_there)
}

/// The change of a staged deployment's arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The arguments to append, in this order.
    pub append: Vec<String>,
    /// The arguments to delete, each once, as [`apply`] does.
    pub delete: Vec<String>,
}

/// The arguments before and after an update.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The arguments of the booted deployment. Those that `old` does not demand are the platform's own.
    pub booted: &'a [String],
    /// The arguments that the booted deployment's config demands; `None` if it has no config. Then an argument of `new`
    /// that is already there counts as a config's, not the platform's.
    pub old: Option<&'a [String]>,
    /// The arguments of the staged deployment.
    pub staged: &'a [String],
    /// The arguments that the staged deployment's config demands.
    pub new: &'a [String],
}

/// The parsed arguments of each list.
struct Lists<'a> {
    booted: Vec<Parameter<'a>>,
    old: Vec<Parameter<'a>>,
    staged: Vec<Parameter<'a>>,
    new: Vec<Parameter<'a>>,
}

impl Lists<'_> {
    /// How often the platform has the argument.
    fn platform(&self, argument: &Parameter<'_>) -> usize {
        number(&self.booted, argument).saturating_sub(number(&self.old, argument))
    }

    /// How often the staged deployment may have the argument.
    fn most(&self, argument: &Parameter<'_>) -> usize {
        self.platform(argument).saturating_add(number(&self.new, argument))
    }

    fn has_leftovers(&self) -> bool {
        self.old.iter().any(|argument| number(&self.staged, argument) > self.most(argument))
    }
}

/// How often `arguments` has the argument.
fn number(arguments: &[Parameter<'_>], argument: &Parameter<'_>) -> usize {
    arguments.iter().filter(|there| *there == argument).count()
}

/// All occurrences of an argument in `arguments` but its first ones, of which `most` is the number.
fn beyond(arguments: &[String], most: impl Fn(&Parameter<'_>) -> usize) -> Vec<String> {
    let parsed = parse(arguments);
    let is_beyond = |at: usize, argument| number(parsed.get(..at).unwrap_or_default(), argument) >= most(argument);
    let numbered = parsed.iter().zip(arguments).enumerate();
    numbered.filter(|(at, (argument, _))| is_beyond(*at, argument)).map(|(_, (_, text))| text.clone()).collect()
}

impl<'a> Update<'a> {
    fn lists(&self) -> Lists<'a> {
        let [booted, old, staged, new] = [self.booted, self.old.unwrap_or(self.new), self.staged, self.new].map(parse);
        Lists { booted, old, staged, new }
    }

    /// The change to the platform's arguments followed by the new config's in one block; `None` if no change is needed.
    #[must_use]
    pub fn change(&self) -> Option<Change> {
        let lists = self.lists();
        let (staged, new) = (&lists.staged, &lists.new);
        let complete = new.iter().all(|argument| number(staged, argument) == lists.most(argument));
        let in_a_block = new.is_empty() || staged.windows(new.len()).any(|window| window == new);
        if complete && in_a_block && !lists.has_leftovers() {
            return None;
        }
        let delete = beyond(self.staged, |argument| {
            let is_a_configs = lists.old.contains(argument) || new.contains(argument);
            if is_a_configs { lists.platform(argument) } else { usize::MAX }
        });
        // Restore platform arguments that the staged deployment lost. Otherwise the next update would treat the config's
        // as the platform's.
        let mut append = Vec::new();
        for argument in new.iter().collect::<BTreeSet<_>>() {
            let lost = lists.platform(argument).saturating_sub(number(staged, argument));
            let spelled = lists.booted.iter().zip(self.booted).find(|(there, _)| *there == argument);
            append.extend(std::iter::repeat_n(spelled, lost).flatten().map(|(_, text)| text.clone()));
        }
        append.extend(self.new.iter().cloned());
        Some(Change { append, delete })
    }

    /// The arguments that the staged deployment lacks or has too many of, for a backend where only the image can change
    /// them; `None` if it has the new config's arguments in order, and none that only the old config demands.
    #[must_use]
    pub fn shortfall(&self) -> Option<Change> {
        let lists = self.lists();
        if missing(self.new, self.staged).is_none() && !lists.has_leftovers() {
            return None;
        }
        let delete = beyond(self.staged, |argument| match lists.old.contains(argument) {
            true => lists.most(argument),
            false => usize::MAX,
        });
        let mut append = beyond(self.new, |argument| number(&lists.staged, argument));
        if append.is_empty() && delete.is_empty() {
            // All arguments are present, but in another order.
            append = self.new.to_vec();
        }
        Some(Change { append, delete })
    }
}

/// Deletes the last occurrence of each argument in `delete`, because the first ones are the platform's, and appends those
/// in `append`.
#[must_use]
pub fn apply(arguments: &[String], append: &[String], delete: &[String]) -> Vec<String> {
    let mut changed = arguments.to_vec();
    for argument in delete {
        if let Some(at) = changed.iter().rposition(|there| there == argument) {
            changed.remove(at);
        }
    }
    changed.extend(append.iter().cloned());
    changed
}

/// Joins `arguments` to one line; `None` if splitting the line would not return them, or if a quote is not closed, which
/// would swallow the arguments that libostree appends.
#[must_use]
pub fn join(arguments: &[String]) -> Option<String> {
    let line = arguments.join(" ");
    let closed = line.matches('"').count().is_multiple_of(2);
    (closed && split(&line) == arguments).then_some(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE_G: &str = "hugepagesz=1G hugepages=32 hugepagesz=2M hugepages=1024";

    fn change(booted: &str, old: &str, staged: &str, new: &str) -> Option<String> {
        let [booted, old, staged, new] = [booted, old, staged, new].map(split);
        let update = Update { booted: &booted, old: Some(&old), staged: &staged, new: &new };
        update.change().map(|change| apply(&staged, &change.append, &change.delete).join(" "))
    }

    #[test]
    fn arguments_split_as_the_kernel_does() {
        assert_eq!(split(" a  b=c\t\u{b}\"d e\" f=\"g h\"\n"), ["a", "b=c", "\"d e\"", "f=\"g h\""]);
        assert!(split(" \n").is_empty());
        assert_eq!(split("a\u{a0}b"), ["a\u{a0}b"]);
    }

    #[test]
    fn arguments_compare_as_in_the_kernel() {
        let same = |a: &str, b: &str| Parameter::new(a) == Parameter::new(b);
        for (a, b) in [
            ("cgroup_no_v1=\"all\"", "cgroup_no_v1=all"),
            ("bar=\"hello world\"", "\"bar=hello world\""),
            ("\"quiet\"", "quiet"),
            ("usb-storage.quirks=x", "usb_storage.quirks=x"),
            ("a=\"b=c\"", "a=b=c"),
            ("a=\"\"", "a="),
        ] {
            assert!(same(a, b), "{a} {b}");
        }
        for (a, b) in [
            ("a=b-c", "a=b_c"),
            ("a=", "a"),
            ("a=B", "a=b"),
            ("A=b", "a=b"),
            ("a=x\"y\"", "a=xy"),
            ("a='b'", "a=b"),
            ("a=b=c", "a=b"),
            ("=a=b", "=a"),
        ] {
            assert!(!same(a, b), "{a} {b}");
        }
        // Malformed arguments are parsed, too.
        for text in ["\"", "\"\"", "=", "\"=", "a=\"", "\"a=\"b\"\"", ""] {
            assert!(same(text, text));
        }
    }

    #[test]
    fn arguments_in_effect_are_compared_in_order_and_with_repetition() {
        let lacks = |demanded: &str, line: &str| missing(&split(demanded), &split(line)).map(str::to_owned);
        let stock = "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=\"all\" psi=0";
        let line = "BOOT_IMAGE=x root=y systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all psi=0";
        assert_eq!(lacks(stock, line), None);
        assert_eq!(lacks("bar=\"hello world\"", "a \"bar=hello world\" b"), None);
        assert_eq!(lacks("hugepages=4 hugepages=4", "hugepages=4").as_deref(), Some("hugepages=4"));
        assert_eq!(lacks("console=ttyS0 console=tty0", "console=tty0 console=ttyS0").as_deref(), Some("console=tty0"));
        assert_eq!(lacks("a= b=c=d", "a= b=c=d"), None);
        assert_eq!(lacks("a=", "a").as_deref(), Some("a="));
    }

    #[test]
    fn the_boot_entry_is_compared_for_arguments_that_a_boot_loader_rewrites() {
        let lacks = |demanded: &str, line: &str, entry: &str| {
            not_in_effect(&split(demanded), &split(line), Some(&split(entry))).map(str::to_owned)
        };
        let demanded = "psi=0 d=\"a\\b;$c\"";
        assert_eq!(lacks(demanded, "psi=0 d=ab", demanded), None);
        assert_eq!(lacks(demanded, "d=ab", demanded).as_deref(), Some("psi=0"));
        assert_eq!(lacks(demanded, "psi=0 d=ab", "psi=0").as_deref(), Some("d=\"a\\b;$c\""));
    }

    #[test]
    fn the_old_configs_arguments_are_replaced_by_the_new_ones_in_order() {
        let eight = "hugepagesz=1G hugepages=8 hugepagesz=2M hugepages=1024";
        let with = |arguments: &str| format!("root=x rw {arguments}");
        assert_eq!(change(&with(ONE_G), ONE_G, &with(ONE_G), eight), Some(with(eight)));
        let (four, both) = ("hugepagesz=1G hugepages=4", "hugepagesz=1G hugepages=4 hugepagesz=2M hugepages=4");
        assert_eq!(change(&with(four), four, &with(four), both), Some(with(both)));
        assert_eq!(change(&with(both), both, &with(both), four), Some(with(four)));
        let (consoles, turned) = ("console=tty0 console=ttyS0", "console=ttyS0 console=tty0");
        assert_eq!(change(&with(consoles), consoles, &with(consoles), turned), Some(with(turned)));
        for same in [ONE_G, four, both, consoles, "a= b=\"c d\" e=f=g", ""] {
            assert_eq!(change(&with(same), same, &with(same), same), None);
        }
        assert_eq!(change(&with("quiet"), "quiet", &with("quiet"), ""), Some("root=x rw".to_owned()));
    }

    #[test]
    fn the_platforms_arguments_stay() {
        // The config demands an argument of the platform, so it occurs twice. When the config drops it, the platform's
        // stays in its place.
        let platform = "console=ttyS0 rw console=tty1";
        let both = format!("{platform} console=ttyS0");
        assert_eq!(change(platform, "", platform, "console=ttyS0"), Some(both.clone()));
        assert_eq!(change(&both, "console=ttyS0", &both, "console=ttyS0"), None);
        assert_eq!(change(&both, "console=ttyS0", &both, ""), Some(platform.to_owned()));
        // A person appended an argument to the staged deployment.
        assert_eq!(change("rw a", "a", "rw a mine", "a"), None);
        assert_eq!(change("rw a", "a", "rw a mine", "b"), Some("rw mine b".to_owned()));
        // The same argument in another spelling.
        assert_eq!(change("rw a=\"b\"", "a=b", "rw a=\"b\"", "c"), Some("rw c".to_owned()));
    }

    #[test]
    fn without_an_old_config_the_demanded_arguments_count_as_a_configs() {
        let after = |staged: &str, new: &str| {
            let (staged, new) = (split(staged), split(new));
            let update = Update { booted: &staged, old: None, staged: &staged, new: &new };
            update.change().map(|change| apply(&staged, &change.append, &change.delete).join(" "))
        };
        assert_eq!(after("rw psi=0 nosmt", "psi=0 nosmt"), None);
        let both = "hugepagesz=1G hugepages=4 hugepagesz=2M hugepages=4";
        assert_eq!(after("rw hugepagesz=1G hugepages=4", both), Some(format!("rw {both}")));
    }

    #[test]
    fn the_shortfall_includes_order_and_leftovers() {
        let short = |old: &str, staged: &str, new: &str| {
            let [old, staged, new] = [old, staged, new].map(split);
            let booted: Vec<String> = split("rw").into_iter().chain(old.clone()).collect();
            let update = Update { booted: &booted, old: Some(&old), staged: &staged, new: &new };
            update.shortfall().map(|Change { append, delete }| (append.join(" "), delete.join(" ")))
        };
        let told = |append: &str, delete: &str| Some((append.to_owned(), delete.to_owned()));
        assert_eq!(short("a", "rw x=\"all\" between y", "x=all y"), None);
        assert_eq!(short("quiet", "rw quiet", "nosmt a=b"), told("nosmt a=b", "quiet"));
        assert_eq!(short("", "rw b a", "a b"), told("a b", ""));
        assert_eq!(short("", "rw h=4", "h=4 h=4"), told("h=4", ""));
    }

    #[test]
    fn arguments_with_an_unclosed_quote_are_not_joined() {
        assert_eq!(join(&split("a b=\"c d\"")).as_deref(), Some("a b=\"c d\""));
        assert_eq!(join(&["a=\"b".to_owned(), "c".to_owned()]), None);
        assert_eq!(join(&["c".to_owned(), "a=\"b".to_owned()]), None);
        assert_eq!(join(&["a=\"b".to_owned(), "c\"".to_owned()]), None);
    }

    fn some_arguments(most: usize) -> impl Strategy<Value = Vec<String>> {
        let words =
            ["a", "b=1", "b=2", "b=\"1\"", "\"b=1\"", "c-d=x y", "c_d=\"x y\"", "e=", "e", "f=g=h", "f=\"g=h\""];
        let words: Vec<&str> = words.into_iter().filter(|word| split(word).len() == 1).collect();
        prop::collection::vec(prop::sample::select(words).prop_map(str::to_owned), 0..most)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

        /// After the change no further change is needed, and no foreign argument is changed.
        #[test]
        fn a_change_converges(
            booted in some_arguments(6),
            old in prop::option::of(some_arguments(5)),
            staged in some_arguments(8),
            new in some_arguments(5),
        ) {
            let update = Update { booted: &booted, old: old.as_deref(), staged: &staged, new: &new };
            let Some(change) = update.change() else { return Ok(()) };
            let line = join(&apply(&staged, &change.append, &change.delete)).unwrap();
            let after = split(&line);
            prop_assert_eq!(Update { staged: &after, ..update }.change(), None);
            prop_assert_eq!(Update { staged: &after, ..update }.shortfall(), None);
            prop_assert_eq!(missing(&new, &after), None);
            let is_others = |argument: &&String| {
                let parameter = Parameter::new(argument);
                !parse(old.as_deref().unwrap_or_default()).contains(&parameter) && !parse(&new).contains(&parameter)
            };
            let others = |list: &[String]| list.iter().filter(is_others).cloned().collect::<Vec<_>>();
            prop_assert_eq!(others(&staged), others(&after));
        }

        /// The platform's arguments keep their order through any two configs, one after the other.
        #[test]
        fn the_platform_survives_every_config(
            platform in some_arguments(5), old in some_arguments(5), new in some_arguments(5),
        ) {
            let booted: Vec<String> = platform.iter().chain(&old).cloned().collect();
            let update = Update { booted: &booted, old: Some(&old), staged: &booted, new: &new };
            let after = match update.change() {
                Some(change) => apply(&booted, &change.append, &change.delete),
                None => booted.clone(),
            };
            let expected: Vec<String> = platform.iter().chain(&new).cloned().collect();
            let (mut after_sorted, mut expected_sorted) = (parse(&after), parse(&expected));
            after_sorted.sort();
            expected_sorted.sort();
            prop_assert_eq!(after_sorted, expected_sorted);
            prop_assert_eq!(missing(&platform, &after), None);
        }
    }
}
