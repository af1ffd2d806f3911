//! The suites of others on shared directories, each compared with what it says about the host's own file system.
//!
//! The quick ones run with all tests. The whole matrix (both kernels, all ways of caching) takes a quarter of an hour:
//! `cargo test -p tests --test p9_suites -- --include-ignored`.
mod fsx;
mod pjdfstest;
mod programs;
