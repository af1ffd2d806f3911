//! Pages of metrics in the text format of Prometheus (version 0.0.4).

use std::fmt::{self, Display, Write as _};

use super::Response;

/// The `Content-Type` of a page.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It goes up only, and from 0 when the process starts again. Its name ends in `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// A page of metrics.
#[derive(Clone, Debug, Default)]
pub struct Page {
    text: String,
}

impl Page {
    /// An empty page.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a metric; its samples follow. Every metric is begun once: that is how the format wants it.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> Family<'_> {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {}", Escaped { text: help, quotes: false });
        let _ = writeln!(self.text, "# TYPE {name} {kind}");
        Family { page: self, name }
    }

    /// A metric with one sample.
    pub fn single(&mut self, name: &'static str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// The page as an answer.
    pub fn into_response(self) -> Response {
        Response::text(CONTENT_TYPE, self.text)
    }

    /// The page's text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The metric to which samples are added.
#[derive(Debug)]
pub struct Family<'a> {
    page: &'a mut Page,
    name: &'static str,
}

impl Family<'_> {
    /// Adds a sample: a number, with labels (names and values) that tell it from the metric's others.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) -> &mut Self {
        let text = &mut self.page.text;
        text.push_str(self.name);
        if !labels.is_empty() {
            text.push('{');
            for (index, (name, value)) in labels.iter().enumerate() {
                let comma = if index == 0 { "" } else { "," };
                let _ = write!(text, "{comma}{name}=\"{}\"", Escaped { text: value, quotes: true });
            }
            text.push('}');
        }
        let _ = writeln!(text, " {value}");
        self
    }
}

/// A text without line ends.
struct Escaped<'a> {
    text: &'a str,
    quotes: bool,
}

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.chars().try_for_each(|character| match character {
            '\\' => f.write_str("\\\\"),
            '\n' => f.write_str("\\n"),
            '"' if self.quotes => f.write_str("\\\""),
            other => f.write_char(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_as_prometheus_wants_it() {
        let mut page = Page::new();
        page.single("up", Kind::Gauge, "It is \"up\".\nReally \\", 1);
        page.family("x_total", Kind::Counter, "Xs.")
            .sample(&[("guest", "a\"b\\c\nd"), ("queue", "1")], 2.5)
            .sample(&[("guest", "e"), ("queue", "2")], u64::MAX);
        assert_eq!(
            page.as_str(),
            "# HELP up It is \"up\".\\nReally \\\\\n# TYPE up gauge\nup 1\n# HELP x_total Xs.\n# TYPE x_total counter\n\
             x_total{guest=\"a\\\"b\\\\c\\nd\",queue=\"1\"} 2.5\nx_total{guest=\"e\",queue=\"2\"} 18446744073709551615\n"
        );
        assert_eq!(page.into_response().content_type, CONTENT_TYPE);
    }
}
