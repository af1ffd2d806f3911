//! What is published as crates: programs, built once, static, so that they run on the host and in any guest; and the
//! source of a C library.
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::RECIPE;
use super::cache::{Cache, progress};
use super::table::{Crate, EXERCISERS, SOURCE};
use crate::process;

/// A build on a slow, busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// The target whose programs can be static and need no toolchain besides the one that built this.
const TARGET: &str =
    if cfg!(target_env = "musl") { "x86_64-unknown-linux-musl" } else { "x86_64-unknown-linux-gnu" };

/// Whether a crate of the table has the program `name`.
pub(super) fn has(name: &str) -> bool {
    EXERCISERS.iter().any(|exerciser| exerciser.name == name)
}

/// The root with all of the table's crates in its `usr/bin`, which are built if need be.
pub(super) fn root() -> Result<PathBuf> {
    let key = (format!("{EXERCISERS:?}"), TARGET, RECIPE);
    Cache::open()?.entry("exercisers", &key, |content, _| {
        let scratch = tempfile::TempDir::with_prefix("exercisers-").context("Cannot make a folder")?;
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // Where no workspace and no configuration of a project has a say.
        cargo.current_dir(scratch.path());
        cargo.args(["install", "--locked", "--target", TARGET, "--root"]).arg(content.join("usr"));
        cargo.arg("--target-dir").arg(scratch.path().join("target"));
        cargo.args(EXERCISERS.map(|Crate { name, version }| format!("{name}@{version}")));
        // Named with a target, so that these flags are not for the build scripts and macros, which cannot be static.
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
        progress("building pjdfstest and fsx, which takes a minute or two");
        process::run(cargo, BUILD_LIMIT).context(
            "Cannot build the file system exercisers; is crates.io reachable, and a C linker there?",
        )?;
        Ok(())
    })
}

/// A tar archive with the C source of zlib, in a folder of that name.
pub fn c_source() -> Result<PathBuf> {
    let folder = Cache::open()?.entry("c-source", &(format!("{SOURCE:?}"), RECIPE), |content, _| {
        let scratch = tempfile::TempDir::with_prefix("c-source-").context("Cannot make a folder")?;
        let Crate { name, version } = SOURCE;
        let manifest = format!(
            "[package]\nname = \"nothing\"\nedition = \"2024\"\n[lib]\npath = \"lib.rs\"\n\
             [dependencies]\n{name} = \"={version}\"\n"
        );
        for (file, text) in [("Cargo.toml", manifest.as_str()), ("lib.rs", "")] {
            fs::write(scratch.path().join(file), text).context("Cannot write a package")?;
        }
        let mut vendor = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        vendor.current_dir(scratch.path()).args(["vendor", "--quiet", "vendor"]);
        process::run(vendor, BUILD_LIMIT)
            .context("Cannot fetch the source of zlib; is crates.io reachable?")?;
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(content.join("zlib.tar"));
        tar.arg("-C").arg(scratch.path().join("vendor").join(name).join("src")).arg("zlib");
        process::run(tar, BUILD_LIMIT).context("Cannot pack the source of zlib").map(|_| ())
    })?;
    Ok(folder.join("zlib.tar"))
}
