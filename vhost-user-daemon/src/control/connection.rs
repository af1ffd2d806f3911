//! One client of a control socket.
//!
//! A connection never blocks, and never holds more than one request and one answer: nothing is read as long as there
//! is something to be written.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::feed::Subscription;
use super::http::{self, CONTINUE, MAX_BODY, MAX_HEAD, Parsed, Response, STREAM_HEAD};
use super::{Handler, Reply};

/// How long a client may take to send a request, and to read something of an answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may stay without a request.
const IDLE: Duration = Duration::from_secs(60);

/// How long the rest of what a client sends is thrown away after it was refused, so that it gets to read why.
const LINGER: Duration = Duration::from_secs(1);

/// Bytes of events that are written in one go.
const STREAM_BATCH: usize = 64 << 10;

/// Bytes that are read in one go.
const READ_SIZE: usize = 16 << 10;

/// A client.
pub(super) struct Connection {
    socket: OwnedFd,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` is written.
    written: usize,
    state: State,
    /// When something last happened that ends a time-out: the request began, a part of the answer was read.
    since: Instant,
    /// The client will send nothing more.
    input_ended: bool,
    /// It was told to send the body.
    continued: bool,
}

/// What comes after `output` is written.
enum State {
    /// Requests are read.
    Reading,
    /// One is answered later.
    Waiting { deadline: Instant, ready: Box<dyn FnMut(bool) -> Option<Response> + Send>, keep_alive: bool },
    /// Events are written for good.
    Streaming(Subscription),
    /// The last answer was given.
    Closing,
    /// The client has been told, and what it sends is thrown away.
    Lingering,
}

/// What becomes of a connection after it has been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait until something happens.
    Wait,
    /// Look again, after the others: there is more to do.
    Again,
    /// Nothing is left.
    Drop,
}

impl Connection {
    /// A client that has just come, on a socket in non-blocking mode.
    pub fn new(socket: OwnedFd, now: Instant) -> Self {
        Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            state: State::Reading,
            since: now,
            input_ended: false,
            continued: false,
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Between two requests: since when. Such a client can be sent away.
    pub fn idle_since(&self) -> Option<Instant> {
        let idle = matches!(self.state, State::Reading | State::Lingering)
            && self.input.is_empty()
            && self.output.is_empty();
        idle.then_some(self.since)
    }

    /// What it waits for. That the client has gone is told in any case.
    pub fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        if !self.output.is_empty() {
            interest |= PollFlags::OUT;
        }
        let reads = match self.state {
            State::Reading => self.output.is_empty(),
            State::Streaming(_) | State::Lingering => true,
            State::Waiting { .. } | State::Closing => false,
        };
        if reads && !self.input_ended {
            interest |= PollFlags::IN;
        }
        interest
    }

    /// When it has to be looked at even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            // A reader of events may rest as long as it likes. It loses events, and is told.
            State::Streaming(_) => None,
            _ if !self.output.is_empty() => Some(self.since + PATIENCE),
            State::Waiting { deadline, .. } => Some(*deadline),
            State::Reading if self.input.is_empty() => Some(self.since + IDLE),
            State::Reading => Some(self.since + PATIENCE),
            State::Closing | State::Lingering => Some(self.since + LINGER),
        }
    }

    /// Goes on, with what poll(2) says of the socket.
    pub fn advance(&mut self, handler: &dyn Handler, ready: PollFlags, now: Instant) -> Next {
        if ready.contains(PollFlags::ERR) {
            return Next::Drop;
        }
        // Who has closed its end reads no answer. A request that it sent before counts all the same.
        let gone = ready.contains(PollFlags::HUP);
        if gone && (!self.output.is_empty() || !matches!(self.state, State::Reading)) {
            return Next::Drop;
        }
        if ready.intersects(PollFlags::IN | PollFlags::HUP) && self.read(now).is_err() {
            return Next::Drop;
        }
        self.proceed(handler, now).unwrap_or(Next::Drop)
    }

    /// Takes what the client has sent, at most [`READ_SIZE`] bytes of it.
    fn read(&mut self, now: Instant) -> Result<(), Errno> {
        if self.input_ended {
            return Ok(());
        }
        let mut buffer = [0; READ_SIZE];
        match recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.input_ended = true,
            Ok((length, _)) => {
                if matches!(self.state, State::Reading) {
                    if self.input.is_empty() {
                        self.since = now;
                    }
                    self.input.extend_from_slice(&buffer[..length]);
                    debug_assert!(self.input.len() <= MAX_HEAD + MAX_BODY + READ_SIZE);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Does what can be done without waiting, up to one request.
    fn proceed(&mut self, handler: &dyn Handler, now: Instant) -> Result<Next, Errno> {
        self.write(now)?;
        if !self.output.is_empty() {
            return Ok(if self.expired(now) { Next::Drop } else { Next::Wait });
        }
        match &mut self.state {
            State::Reading => return Ok(self.take_request(handler, now)),
            State::Waiting { deadline, ready, keep_alive } => {
                let expired = *deadline <= now;
                let response = ready(expired);
                let keep_alive = *keep_alive;
                if let Some(response) = response {
                    self.answer(&response, keep_alive, false, now);
                } else if expired {
                    self.answer(&Response::fault(504, "There was no answer in time"), keep_alive, false, now);
                } else {
                    return Ok(Next::Wait);
                }
            }
            State::Streaming(subscription) => {
                subscription.read(&mut self.output, STREAM_BATCH);
                if self.output.is_empty() {
                    return Ok(Next::Wait);
                }
            }
            State::Closing => {
                shutdown(&self.socket, Shutdown::Write)?;
                self.state = State::Lingering;
                self.since = now;
            }
            State::Lingering => {
                return Ok(if self.input_ended || self.expired(now) { Next::Drop } else { Next::Wait });
            }
        }
        Ok(Next::Again)
    }

    /// Serves the next request in `input`.
    fn take_request(&mut self, handler: &dyn Handler, now: Instant) -> Next {
        match http::parse(&self.input) {
            // Not even the beginning of one.
            Ok(Parsed::Partial { .. }) if self.input.is_empty() => {
                return if self.input_ended || self.expired(now) { Next::Drop } else { Next::Wait };
            }
            Ok(Parsed::Partial { .. }) if self.input_ended => return Next::Drop,
            Ok(Parsed::Partial { .. }) if self.expired(now) => {
                let message = format!("The request was not complete within {} seconds", PATIENCE.as_secs());
                self.answer(&Response::fault(408, &message), false, false, now);
            }
            Ok(Parsed::Partial { expects: true }) if !self.continued => {
                self.continued = true;
                self.output.extend_from_slice(CONTINUE);
            }
            Ok(Parsed::Partial { .. }) => return Next::Wait,
            Ok(Parsed::Whole { request, length, keep_alive }) => {
                self.input.drain(..length);
                self.continued = false;
                match handler.handle(&request) {
                    Reply::Now(response) => self.answer(&response, keep_alive, false, now),
                    Reply::Later { deadline, ready } => {
                        self.state = State::Waiting { deadline, ready, keep_alive };
                    }
                    Reply::Stream(subscription) => {
                        self.output.extend_from_slice(STREAM_HEAD);
                        self.state = State::Streaming(subscription);
                        self.input = Vec::new();
                    }
                }
            }
            Err(refusal) => self.answer(&refusal.response, false, refusal.bodiless, now),
        }
        Next::Again
    }

    /// Gives the answer to a request.
    fn answer(&mut self, response: &Response, keep_alive: bool, bodiless: bool, now: Instant) {
        response.write(&mut self.output, keep_alive, bodiless);
        self.since = now;
        if keep_alive {
            self.state = State::Reading;
        } else {
            self.state = State::Closing;
            self.input = Vec::new();
        }
    }

    /// Writes as much of `output` as the socket takes.
    fn write(&mut self, now: Instant) -> Result<(), Errno> {
        while self.written < self.output.len() {
            match send(&self.socket, &self.output[self.written..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            {
                Ok(length) => {
                    self.written += length;
                    self.since = now;
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.written = 0;
        self.output.clear();
        self.output.shrink_to(STREAM_BATCH);
        Ok(())
    }

    fn expired(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Bell, Feed, Request};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Answers with the path, and by it.
    struct Echo {
        feed: Feed,
        ready: Arc<AtomicBool>,
        deadline: Instant,
    }

    impl Handler for Echo {
        fn handle(&self, request: &Request) -> Reply {
            match &*request.path {
                "/later" => {
                    let ready = Arc::clone(&self.ready);
                    Reply::Later {
                        deadline: self.deadline,
                        ready: Box::new(move |_| {
                            ready.load(Ordering::Relaxed).then(|| Response::json(&"late"))
                        }),
                    }
                }
                "/stream" => Reply::Stream(self.feed.subscribe(0)),
                "/large" => Response::text("text/plain", "x".repeat(10 << 20)).into(),
                path => Response::json(&path).into(),
            }
        }
    }

    struct Fixture {
        echo: Echo,
        connection: Connection,
        client: UnixStream,
        now: Instant,
    }

    impl Fixture {
        fn new() -> Self {
            let now = Instant::now();
            let (client, server) = UnixStream::pair().unwrap();
            server.set_nonblocking(true).unwrap();
            client.set_nonblocking(true).unwrap();
            let feed = Feed::new(&Bell::new().unwrap(), |lost| format!("{lost}"));
            let echo = Echo { feed, ready: Arc::default(), deadline: now + Duration::from_secs(3) };
            Self { echo, connection: Connection::new(server.into(), now), client, now }
        }

        /// Sends, and lets the connection do what it can. Gives what it did and said.
        fn send(&mut self, input: &str) -> (Next, String) {
            self.client.write_all(input.as_bytes()).unwrap();
            self.advance(PollFlags::IN)
        }

        fn advance(&mut self, mut flags: PollFlags) -> (Next, String) {
            loop {
                match self.connection.advance(&self.echo, flags, self.now) {
                    Next::Again => flags = PollFlags::empty(),
                    next => return (next, self.received()),
                }
            }
        }

        fn received(&mut self) -> String {
            let mut output = Vec::new();
            // Ends with the data: the socket does not block.
            let _ = self.client.read_to_end(&mut output);
            String::from_utf8(output).unwrap()
        }

        fn after(&mut self, seconds: u64) -> (Next, String) {
            self.now += Duration::from_secs(seconds);
            self.advance(PollFlags::empty())
        }
    }

    const GET: &str = "GET /a HTTP/1.1\r\n\r\n";

    #[test]
    fn requests_follow_each_other() {
        let mut fixture = Fixture::new();
        assert!(fixture.connection.idle_since().is_some());
        let (next, output) = fixture.send(&GET.repeat(3));
        assert_eq!((next, output.matches("\r\n\r\n\"/a\"\n").count()), (Next::Wait, 3), "{output}");
        let (next, output) = fixture.send("GET /b HTTP/1.1\r\nConnection: close\r\n\r\nGET /c");
        assert!(next == Next::Wait && output.ends_with("\"/b\"\n"), "{output}");
        drop(fixture.client.shutdown(std::net::Shutdown::Write));
        assert_eq!(fixture.advance(PollFlags::IN).0, Next::Drop);
    }

    #[test]
    fn half_a_request_has_ten_seconds_however_it_comes() {
        let mut fixture = Fixture::new();
        let end = fixture.now + PATIENCE;
        for byte in 0..9 {
            assert_eq!(fixture.send(&GET[byte..=byte]), (Next::Wait, String::new()));
            assert_eq!(fixture.connection.deadline(), Some(end));
            fixture.now += Duration::from_secs(1);
        }
        let (_, output) = fixture.after(1);
        assert!(output.starts_with("HTTP/1.1 408 "), "{output}");
        assert_eq!(fixture.after(1).0, Next::Drop);
    }

    #[test]
    fn a_silent_client_is_let_go() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.after(59).0, Next::Wait);
        assert_eq!(fixture.after(1).0, Next::Drop);
    }

    #[test]
    fn a_client_that_waits_to_be_asked_is_asked_once() {
        let mut fixture = Fixture::new();
        let head = "PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(fixture.send(head).1, "HTTP/1.1 100 Continue\r\n\r\n");
        assert_eq!(fixture.send("1").1, "");
        assert!(fixture.send("23").1.starts_with("HTTP/1.1 200 "));
        assert!(fixture.send(&head.replace('3', "66000")).1.starts_with("HTTP/1.1 413 "));
    }

    #[test]
    fn an_answer_may_come_later_or_not_at_all() {
        let mut fixture = Fixture::new();
        let later = "GET /later HTTP/1.1\r\n\r\n";
        assert_eq!(fixture.send(&[later, GET].concat()), (Next::Wait, String::new()));
        assert_eq!(fixture.connection.deadline(), Some(fixture.echo.deadline));
        fixture.echo.ready.store(true, Ordering::Relaxed);
        let (_, output) = fixture.advance(PollFlags::empty());
        assert!(output.contains("\"late\"\n") && output.ends_with("\"/a\"\n"), "{output}");
        fixture.echo.ready.store(false, Ordering::Relaxed);
        assert_eq!(fixture.send(later), (Next::Wait, String::new()));
        assert!(fixture.after(3).1.starts_with("HTTP/1.1 504 "));
        fixture.echo.deadline = fixture.now + Duration::from_secs(3);
        assert_eq!(fixture.send(later), (Next::Wait, String::new()));
        assert_eq!(fixture.advance(PollFlags::HUP).0, Next::Drop);
    }

    #[test]
    fn who_does_not_read_is_let_go() {
        let mut fixture = Fixture::new();
        let large = "GET /large HTTP/1.1\r\n\r\n";
        fixture.client.write_all(large.as_bytes()).unwrap();
        fixture.connection.advance(&fixture.echo, PollFlags::IN, fixture.now);
        for _ in 0..3 {
            assert_eq!(fixture.connection.advance(&fixture.echo, PollFlags::IN, fixture.now), Next::Wait);
        }
        assert_eq!(fixture.connection.interest(), PollFlags::OUT);
        // A part is read, and ten seconds begin.
        fixture.now += Duration::from_secs(9);
        assert!(!fixture.advance(PollFlags::OUT).1.is_empty());
        for _ in 0..2 {
            assert_eq!(fixture.connection.advance(&fixture.echo, PollFlags::OUT, fixture.now), Next::Wait);
        }
        fixture.now += Duration::from_secs(9);
        assert_eq!(fixture.connection.advance(&fixture.echo, PollFlags::empty(), fixture.now), Next::Wait);
        fixture.now += Duration::from_secs(1);
        assert_eq!(fixture.connection.advance(&fixture.echo, PollFlags::empty(), fixture.now), Next::Drop);
    }

    #[test]
    fn a_reader_of_events_may_be_late_and_its_buffer_stays_small() {
        let mut fixture = Fixture::new();
        let (_, head) = fixture.send("GET /stream HTTP/1.1\r\n\r\n");
        assert!(head.contains("Connection: close\r\n"), "{head}");
        assert_eq!(fixture.connection.deadline(), None);
        let event = "x".repeat(1000);
        for _ in 0..3000 {
            fixture.echo.feed.publish(&event);
            while fixture.connection.advance(&fixture.echo, PollFlags::empty(), fixture.now) == Next::Again {}
        }
        assert!(fixture.connection.output.len() < STREAM_BATCH + 2000);
        let mut lines = String::new();
        loop {
            let (next, output) = fixture.advance(PollFlags::OUT);
            assert_eq!(next, Next::Wait);
            if output.is_empty() {
                break;
            }
            lines.push_str(&output);
        }
        let lost: Vec<u64> = lines.lines().filter_map(|line| line.parse().ok()).collect();
        let events = lines.lines().filter(|line| line.len() == 1002).count() as u64;
        assert_eq!(lost.len(), 1);
        assert_eq!(events + lost[0], 3000);
        assert_eq!(fixture.advance(PollFlags::HUP).0, Next::Drop);
    }

    #[test]
    fn a_request_counts_even_if_nobody_waits_for_the_answer() {
        let mut fixture = Fixture::new();
        fixture.client.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
        fixture.echo.ready.store(true, Ordering::Relaxed);
        drop(std::mem::replace(&mut fixture.client, UnixStream::pair().unwrap().0));
        assert_eq!(
            fixture.connection.advance(&fixture.echo, PollFlags::IN | PollFlags::HUP, fixture.now),
            Next::Again
        );
        assert!(matches!(fixture.connection.state, State::Waiting { .. }));
        assert_eq!(fixture.connection.advance(&fixture.echo, PollFlags::HUP, fixture.now), Next::Drop);
    }
}
