//! Requests and answers of HTTP/1.1 (RFC 9112), as far as a control socket needs them: bodies with a length, no
//! chunks, no trailers.

use std::borrow::Cow;
use std::io::Write as _;

use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// Bytes that the head of a request can have at most.
pub const MAX_HEAD: usize = 16 << 10;

/// Bytes that the body of a request can have at most.
pub const MAX_BODY: usize = 64 << 10;

/// Headers that a request can have at most.
const MAX_HEADERS: usize = 64;

/// The methods that a [`Handler`](super::Handler) sees; all others are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the methods of the same names")]
pub enum Method {
    Get,
    Put,
    Patch,
    Post,
    Delete,
}

impl Method {
    /// The methods' names, for the `Allow` header.
    const ALL: &'static str = "GET, PUT, PATCH, POST, DELETE";

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "GET" => Some(Self::Get),
            "PUT" => Some(Self::Put),
            "PATCH" => Some(Self::Patch),
            "POST" => Some(Self::Post),
            "DELETE" => Some(Self::Delete),
            _ => None,
        }
    }
}

/// A request, complete and within the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// With what: begins with `/`, escapes are resolved, and there is no query in it.
    pub path: String,
    /// The names and values after the `?`.
    pub query: Vec<(String, String)>,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
}

impl Request {
    /// The first value of `name` in the query.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| &**value)
    }

    /// The body, as JSON; otherwise an answer that says what is wrong with it.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Response> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Response::fault(400, &format!("The body of the request is not as it should be: {error}"))
        })
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
    /// The methods that the path has, with status 405.
    allow: Option<&'static str>,
}

impl Response {
    /// 200 with a JSON body.
    pub fn json(body: &impl Serialize) -> Self {
        Self::json_with(200, body)
    }

    /// 200 with a text, such as a page of [metrics](super::metrics).
    pub fn text(content_type: &'static str, body: String) -> Self {
        Self { status: 200, content_type, body: body.into_bytes(), allow: None }
    }

    /// 204: done, and there is nothing to say.
    pub fn no_content() -> Self {
        Self { status: 204, content_type: "", body: Vec::new(), allow: None }
    }

    /// A status of 400 and up, and the reason for a person: `{"fault_message": "..."}`, as Firecracker's API has it.
    pub fn fault(status: u16, message: &str) -> Self {
        Self::json_with(status, &json!({ "fault_message": message }))
    }

    /// 404: nothing has this path.
    pub fn not_found(request: &Request) -> Self {
        Self::fault(404, &format!("There is no {}", request.path))
    }

    /// 405: the path has other methods, which are listed, separated by commas.
    pub fn method_not_allowed(allow: &'static str) -> Self {
        Self { allow: Some(allow), ..Self::fault(405, &format!("The methods are: {allow}")) }
    }

    fn json_with(status: u16, body: &impl Serialize) -> Self {
        let mut body = match serde_json::to_vec(body) {
            Ok(body) => body,
            // A map with keys that are no strings, for example.
            Err(error) => return Self::fault(500, &format!("The answer cannot be written: {error}")),
        };
        body.push(b'\n');
        Self { status, content_type: "application/json", body, allow: None }
    }

    /// Appends the answer to `output`. With `bodiless`, which is the answer to HEAD, all but the body.
    pub(super) fn write(&self, output: &mut Vec<u8>, keep_alive: bool, bodiless: bool) {
        // Writing to a vector cannot fail.
        let _ = write!(output, "HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        if self.status != 204 {
            let _ = write!(output, "Content-Length: {}\r\n", self.body.len());
            let _ = write!(output, "Content-Type: {}\r\n", self.content_type);
        }
        if let Some(allow) = self.allow {
            let _ = write!(output, "Allow: {allow}\r\n");
        }
        if !keep_alive {
            output.extend_from_slice(b"Connection: close\r\n");
        }
        output.extend_from_slice(b"\r\n");
        if !bodiless {
            output.extend_from_slice(&self.body);
        }
    }
}

/// The head of an answer that goes on until the connection is closed: a line of JSON for each event.
pub(super) const STREAM_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n";

/// What makes a client send the body for which it waits to be asked.
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The words for a status, which are for people.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Other",
    }
}

/// A request that cannot be read: what is answered before the connection is closed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub response: Response,
    /// The request was HEAD, to which an answer has no body.
    pub bodiless: bool,
}

impl From<Response> for Refusal {
    fn from(response: Response) -> Self {
        Self { response, bodiless: false }
    }
}

fn refuse(status: u16, message: &str) -> Refusal {
    Response::fault(status, message).into()
}

/// What the beginning of a connection's input is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// Not a whole request yet. `expects`: the client waits for [`CONTINUE`] before it sends the body.
    Partial { expects: bool },
    /// A request, so many bytes long, and whether the connection can be used for another one.
    Whole { request: Request, length: usize, keep_alive: bool },
}

/// Reads the first request in `input`.
pub(super) fn parse(input: &[u8]) -> Result<Parsed, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(&input[..input.len().min(MAX_HEAD)]) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if input.len() < MAX_HEAD => {
            return Ok(Parsed::Partial { expects: false });
        }
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(refuse(
                431,
                &format!("The head of a request has at most {MAX_HEAD} bytes and {MAX_HEADERS} headers"),
            ));
        }
        Err(error) => return Err(refuse(400, &format!("This is no HTTP request: {error}"))),
    };
    // All three are there when the head is complete.
    let (name, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
    let Some(method) = Method::from_name(name) else {
        let response = Response::method_not_allowed(Method::ALL);
        return Err(Refusal { response, bodiless: name == "HEAD" });
    };
    let body_length = body_length(head.headers)?;
    let Some(body) = input.get(length..length + body_length) else {
        return Ok(Parsed::Partial { expects: has_token(head.headers, "expect", "100-continue") });
    };
    let (path, query) = split_target(target)?;
    let keep_alive = match head.version {
        Some(1) => !has_token(head.headers, "connection", "close"),
        _ => has_token(head.headers, "connection", "keep-alive"),
    };
    let request = Request { method, path, query, body: body.to_vec() };
    Ok(Parsed::Whole { request, length: length + body_length, keep_alive })
}

/// How long the body is that follows (RFC 9112, section 6.3). At most [`MAX_BODY`].
fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, Refusal> {
    if values(headers, "transfer-encoding").next().is_some() {
        return Err(refuse(411, "Chunks are not understood: send the body with a Content-Length"));
    }
    let mut lengths = values(headers, "content-length");
    let Some(first) = lengths.next() else { return Ok(0) };
    // Two lengths are a way to smuggle requests.
    if lengths.any(|other| other != first)
        || first.is_empty()
        || !first.bytes().all(|byte| byte.is_ascii_digit())
    {
        return Err(refuse(400, "The Content-Length is not a number"));
    }
    match first.parse() {
        Ok(length) if length <= MAX_BODY => Ok(length),
        _ => Err(refuse(413, &format!("The body of a request has at most {MAX_BODY} bytes"))),
    }
}

/// The values of all headers of a name, which is in small letters. What is not text is no value that is known.
pub(super) fn values<'a>(
    headers: &'a [httparse::Header<'a>],
    name: &'a str,
) -> impl Iterator<Item = &'a str> + 'a {
    headers
        .iter()
        .filter(move |header| header.name.eq_ignore_ascii_case(name))
        .map(|header| std::str::from_utf8(header.value).unwrap_or_default().trim())
}

/// Whether a header that is a list has such a member.
pub(super) fn has_token(headers: &[httparse::Header<'_>], name: &str, token: &str) -> bool {
    values(headers, name)
        .any(|value| value.split(',').any(|member| member.trim().eq_ignore_ascii_case(token)))
}

/// The path and the query of a request's target.
fn split_target(target: &str) -> Result<(String, Vec<(String, String)>), Refusal> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if !path.starts_with('/') {
        return Err(refuse(400, "The target of the request does not begin with a slash"));
    }
    let path = percent_decode_str(path)
        .decode_utf8()
        .map(Cow::into_owned)
        .map_err(|_| refuse(400, "The target of the request is not UTF-8"))?;
    Ok((path, form_urlencoded::parse(query.as_bytes()).into_owned().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(input: &str) -> (Request, usize, bool) {
        match parse(input.as_bytes()) {
            Ok(Parsed::Whole { request, length, keep_alive }) => (request, length, keep_alive),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn status(input: &str) -> u16 {
        parse(input.as_bytes()).unwrap_err().response.status
    }

    #[test]
    fn a_request_is_taken_apart() {
        let input =
            "PUT /v1/a%20b?x=1&y=a%26b+c&x=2 HTTP/1.1\r\nHost: x\r\ncontent-length: 3\r\n\r\nabcGET /";
        let (request, length, keep_alive) = whole(input);
        assert_eq!(request.method, Method::Put);
        assert_eq!(request.path, "/v1/a b");
        assert_eq!(request.query("x"), Some("1"));
        assert_eq!(request.query("y"), Some("a&b c"));
        assert_eq!(request.query("z"), None);
        assert_eq!(request.body, b"abc");
        assert_eq!(&input[length..], "GET /");
        assert!(keep_alive);
    }

    #[test]
    fn connections_are_kept_as_the_versions_say() {
        for (version, header, kept) in [
            ("1.1", "", true),
            ("1.1", "Connection: Close\r\n", false),
            ("1.1", "Connection: foo, close\r\n", false),
            ("1.0", "", false),
            ("1.0", "connection: Keep-Alive\r\n", true),
        ] {
            let (_, _, keep_alive) = whole(&format!("GET / HTTP/{version}\r\n{header}\r\n"));
            assert_eq!(keep_alive, kept, "{version} {header}");
        }
    }

    #[test]
    fn every_beginning_of_a_request_is_partial() {
        let input = b"PUT /v1/target HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n12345";
        for length in 0..input.len() {
            let expects = length >= input.len() - 5;
            assert_eq!(parse(&input[..length]), Ok(Parsed::Partial { expects }), "{length}");
        }
        assert!(matches!(parse(input), Ok(Parsed::Whole { length, .. }) if length == input.len()));
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        assert_eq!(status("HELLO\r\n\r\n"), 400);
        assert_eq!(status("\x16\x03\x01\x02\0\x01"), 400);
        assert_eq!(status("TRACE / HTTP/1.1\r\n\r\n"), 405);
        assert_eq!(status("GET http://x/ HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("GET /%ff HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 411);
        assert_eq!(status("PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"), 413);
        assert_eq!(status("PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"), 413);
        for length in ["-1", "+1", "1 2", "x", "", "1\r\nContent-Length: 2"] {
            assert_eq!(
                status(&format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n")),
                400,
                "{length}"
            );
        }
        assert_eq!(status(&format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1))), 431);
        assert_eq!(status(&format!("GET / HTTP/1.1\r\na: {}", "b".repeat(MAX_HEAD))), 431);
        assert!(parse(b"HEAD / HTTP/1.1\r\n\r\n").unwrap_err().bodiless);
    }

    #[test]
    fn an_answer_is_written_whole() {
        let mut output = Vec::new();
        Response::json(&json!({"a": 1})).write(&mut output, true, false);
        let text =
            "HTTP/1.1 200 OK\r\nContent-Length: 8\r\nContent-Type: application/json\r\n\r\n{\"a\":1}\n";
        assert_eq!(String::from_utf8(output).unwrap(), text);
        let mut output = Vec::new();
        Response::no_content().write(&mut output, false, false);
        assert_eq!(output, b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
        let mut output = Vec::new();
        Response::method_not_allowed("GET").write(&mut output, false, true);
        let text = String::from_utf8(output).unwrap();
        assert!(text.contains("\r\nAllow: GET\r\n") && text.ends_with("\r\n\r\n"), "{text}");
    }

    #[test]
    fn a_body_that_is_not_what_it_should_be_is_explained() {
        let (request, ..) = whole("PUT / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{]");
        let response = request.json::<u64>().unwrap_err();
        assert_eq!(response.status, 400);
        assert!(String::from_utf8(response.body).unwrap().starts_with(r#"{"fault_message":"The body"#));
    }

    /// Bytes that often are nearly a request.
    fn nearly_a_request() -> impl Strategy<Value = Vec<u8>> {
        let word = prop::sample::select(vec![
            "GET",
            "PUT ",
            "/",
            "/a?b=c",
            " HTTP/1.1",
            "\r\n",
            "\r\n\r\n",
            "Content-Length:",
            " 3",
            "Expect: 100-continue",
            "Connection: close",
            "Transfer-Encoding: chunked",
            "%",
            "%2",
            "abc",
            "\0",
            ":",
        ]);
        let words = prop::collection::vec(word, 0..20).prop_map(|words| words.concat().into_bytes());
        prop_oneof![words, prop::collection::vec(any::<u8>(), 0..200)]
    }

    proptest! {
        #[test]
        fn nothing_that_comes_is_trouble(input in nearly_a_request()) {
            if let Ok(Parsed::Whole { request, length, .. }) = parse(&input) {
                prop_assert!(length <= input.len());
                prop_assert!(request.path.starts_with('/'));
                prop_assert!(request.body.len() <= length);
            }
        }

        #[test]
        fn what_is_sent_arrives(path in "/[a-z/%?&= ]{0,30}", body in prop::collection::vec(any::<u8>(), 0..300)) {
            let escaped: String = form_urlencoded::byte_serialize(&path.as_bytes()[1..]).collect();
            let head = format!("POST /{} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", escaped.replace('+', "%20"), body.len());
            let input = [head.as_bytes(), &body, b"GET"].concat();
            let Ok(Parsed::Whole { request, length, .. }) = parse(&input) else { panic!("refused") };
            prop_assert_eq!(length, input.len() - 3);
            prop_assert_eq!(request, Request { method: Method::Post, path, query: vec![], body });
        }
    }
}
