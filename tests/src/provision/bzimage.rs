//! The ELF kernel inside a bzImage, which QEMU boots directly (PVH): the guest does not spend its first seconds on
//! decompressing itself under emulation.
use std::io::Read;

use anyhow::{Context, Result, bail, ensure};

/// Takes the kernel out of a bzImage.
pub(super) fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("It is no bzImage")?;
    let mut kernel = Vec::new();
    if payload.starts_with(b"\x28\xb5\x2f\xfd") {
        ruzstd::decoding::StreamingDecoder::new(payload)?.read_to_end(&mut kernel)?;
    } else if payload.starts_with(b"\xfd7zXZ\0") {
        // The kernel's size follows the stream.
        lzma_rust2::XzReader::new(payload, false).read_to_end(&mut kernel)?;
    } else {
        bail!("It is compressed in an unknown way (known are zstd and xz)");
    }
    ensure!(kernel.starts_with(b"\x7fELF"), "What it holds is no ELF file");
    Ok(kernel)
}

/// The compressed kernel, which the boot protocol's header locates (Documentation/arch/x86/boot.rst).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + field(0x248)?;
    image.get(start..)?.get(..field(0x24c)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x600];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&0x200_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"behind");
        image
    }

    #[test]
    fn the_header_locates_the_payload() {
        assert_eq!(payload(&image(b"a kernel")).unwrap(), b"a kernel");
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(payload(b"\x7fELF"), None);
        assert_eq!(payload(&image(b"a kernel")[..0x602]), None, "a truncated image");
        assert!(extract(&image(b"a kernel")).unwrap_err().to_string().contains("unknown way"));
    }
}
