//! The control socket of a balloon and its clients, over a real socket. The balloon is a fake one, which does at once,
//! or never, what a guest does in its own time.

mod ctl;
mod fake;
mod routes;
