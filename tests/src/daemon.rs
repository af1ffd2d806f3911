//! Building and running the daemons under test.
