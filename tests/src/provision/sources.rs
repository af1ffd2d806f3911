//! Where the host's own apt gets Debian from.
use std::path::Path;

/// One apt source.
#[derive(Debug, Default, PartialEq, Eq)]
struct Source {
    types: Vec<String>,
    uris: Vec<String>,
    components: Vec<String>,
    options: String,
    disabled: bool,
}

/// The URI of the Debian mirror that the host's apt uses; `None` when it has none.
///
/// Only the URI is taken over: suites and keys are the tests' own.
pub(super) fn host_mirror(etc_apt: &Path) -> Option<String> {
    let mut paths = vec![etc_apt.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(etc_apt.join("sources.list.d")) {
        paths.extend(entries.flatten().map(|entry| entry.path()));
    }
    // The order of a directory listing is arbitrary, and the choice should not be.
    paths.sort();
    let mut sources = Vec::new();
    for path in paths {
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => sources.extend(parse_deb822(&text)),
            Some("list") => sources.extend(parse_one_line(&text)),
            _ => {}
        }
    }
    choose_mirror(&sources)
}

/// The mirror of Debian itself among sources that may also name vendors' repositories.
fn choose_mirror(sources: &[Source]) -> Option<String> {
    let is_debian = |uri: &&String| {
        let path = uri.trim_end_matches('/');
        // Debian's cloud images name a file with a list of mirrors.
        !uri.starts_with("cdrom:") && (path.ends_with("/debian") || path.ends_with("/debian.list"))
    };
    sources
        .iter()
        .filter(|source| !source.disabled)
        .filter(|source| source.types.iter().any(|kind| kind == "deb"))
        // Vendors' repositories also end in "/debian", but call their component "stable" or after themselves.
        .filter(|source| source.components.iter().any(|component| component == "main"))
        .filter_map(|source| Some((source, source.uris.iter().find(is_debian)?)))
        .max_by_key(|(source, _)| source.options.contains("debian-archive"))
        .map(|(_, uri)| uri.trim_end_matches('/').to_owned())
}

/// Parses the deb822 format: stanzas of `Field: value` lines, where an indented line continues a value.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    // The empty line at the end closes the last stanza.
    for line in text.lines().filter(|line| !line.starts_with('#')).chain([""]) {
        if line.trim().is_empty() {
            if !fields.is_empty() {
                sources.push(source_of_fields(&std::mem::take(&mut fields)));
            }
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_of_fields(fields: &[(String, String)]) -> Source {
    let field = |name| fields.iter().find(|(field, _)| field == name).map_or("", |(_, value)| value);
    let words = |name| field(name).split_whitespace().map(str::to_owned).collect();
    Source {
        types: words("types"),
        uris: words("uris"),
        components: words("components"),
        options: field("signed-by").to_owned(),
        disabled: field("enabled").eq_ignore_ascii_case("no"),
    }
}

/// Parses the one-line format: `deb [option=value ...] URI suite component...`.
fn parse_one_line(text: &str) -> Vec<Source> {
    let parse = |line: &str| {
        let line = line.split('#').next()?.trim();
        let (kind, rest) = line.split_once([' ', '\t'])?;
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        let uri = words.next()?;
        let _suite = words.next()?;
        Some(Source {
            types: vec![kind.to_owned()],
            uris: vec![uri],
            components: words.collect(),
            options: options.to_owned(),
            disabled: false,
        })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
Types: deb deb-src
# a comment inside a stanza
URIs: https://mirror.example/debian/
Suites: bookworm
 bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: https://mirror.example/debian-security
Suites: bookworm-security
Components: main
";

    #[test]
    fn deb822_stanzas_are_parsed() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].types, ["deb", "deb-src"]);
        assert_eq!(sources[0].uris, ["https://mirror.example/debian/"]);
        assert_eq!(sources[1].components, ["main"]);
        assert_eq!(choose_mirror(&sources).unwrap(), "https://mirror.example/debian");
    }

    #[test]
    fn one_line_sources_are_parsed() {
        let sources = parse_one_line(
            "# deb http://old.example/debian bookworm main\n\
             deb-src http://source.example/debian bookworm main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib # the mirror\n\
             deb\n",
        );
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[1].options, "arch=amd64 signed-by=/k.gpg");
        assert_eq!(sources[1].components, ["main", "contrib"]);
        assert_eq!(choose_mirror(&sources).unwrap(), "http://mirror.example/debian");
    }

    #[test]
    fn vendors_and_disabled_sources_are_passed_over() {
        let vendor = parse_one_line("deb https://vendor.example/linux/debian bookworm stable");
        assert_eq!(choose_mirror(&vendor), None);
        let disabled = parse_deb822(&DEB822.replace("Types: deb\n", "Enabled: no\nTypes: deb\n"));
        assert!(disabled[1].disabled);
        let ubuntu = parse_one_line("deb http://mirror.example/ubuntu noble main");
        assert_eq!(choose_mirror(&ubuntu), None);
    }

    #[test]
    fn a_list_of_mirrors_is_a_mirror() {
        let sources = parse_one_line("deb mirror+file:/etc/apt/mirrors/debian.list bookworm main");
        assert_eq!(choose_mirror(&sources).unwrap(), "mirror+file:/etc/apt/mirrors/debian.list");
    }

    #[test]
    fn files_of_both_formats_are_read() {
        let folder = tempfile::TempDir::new().unwrap();
        assert_eq!(host_mirror(folder.path()), None);
        std::fs::create_dir(folder.path().join("sources.list.d")).unwrap();
        std::fs::write(folder.path().join("sources.list.d/debian.sources"), DEB822).unwrap();
        assert_eq!(host_mirror(folder.path()).unwrap(), "https://mirror.example/debian");
    }
}
