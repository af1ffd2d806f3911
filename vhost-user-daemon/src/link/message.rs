//! The messages that the link looks at: their numbers, their bodies, and what is wrong with them.
//!
//! vhost-user text, sections "Message types" and "Message Specification".

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::Message;

/// Numbers of the requests that the link looks at (vhost-user text, "Front-end message types").
pub(super) mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// The largest configuration space (vhost-user text, "Virtio device config space").
const MAX_CONFIG: usize = 256;

/// Bit 8 of a `SET_VRING_KICK`, `CALL` or `ERR`: no file descriptor comes along.
pub(super) const NO_FD: u64 = 1 << 8;

/// `vhost_vring_state`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct VringState {
    pub(super) index: u32,
    pub(super) num: u32,
}

/// The head of a configuration space message.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigHeader {
    pub(super) offset: u32,
    pub(super) size: u32,
    pub(super) flags: u32,
}

/// The body of `SET_LOG_BASE`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct LogBase {
    pub(super) size: u64,
    pub(super) offset: u64,
}

/// The body of `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct InflightBody {
    pub(super) mmap_size: u64,
    pub(super) mmap_offset: u64,
    pub(super) num_queues: u16,
    pub(super) queue_size: u16,
    /// The structure is packed in the text, but QEMU sends it with the padding of C.
    pub(super) padding: [u8; 4],
}

/// Why a request is refused. It is acknowledged with an error.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) reason: String,
    /// The stock daemon refused it, and has closed its end; otherwise the connection lives on.
    pub(super) fatal: bool,
}

impl Refusal {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), fatal: false }
    }

    pub(super) fn fatal(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), fatal: true }
    }
}

/// The name of a request in the text, or its number.
pub(super) fn request_name(request: u32) -> String {
    FrontendReq::try_from(request).map_or_else(|()| request.to_string(), |known| format!("{known:?}"))
}

/// Whether file descriptors belong to the request.
pub(super) fn takes_files(request: u32) -> bool {
    matches!(
        request,
        request::SET_MEM_TABLE
            | request::SET_LOG_BASE
            | request::SET_VRING_KICK
            | request::SET_VRING_CALL
            | request::SET_VRING_ERR
            | request::SET_BACKEND_REQ_FD
            | request::SET_INFLIGHT_FD
            | request::ADD_MEM_REG
    )
}

/// The body of `message`, which has to have exactly the size of `T`.
pub(super) fn body<T: FromBytes>(message: &Message) -> Result<T, Refusal> {
    message.body_as().ok_or_else(|| Refusal::new(format!("Body of {} bytes", message.body.len())))
}

/// The body of a message about chains in flight, with or without its padding.
pub(super) fn inflight_body(message: &Message) -> Result<InflightBody, Refusal> {
    let mut whole = [0; size_of::<InflightBody>()];
    let len = message.body.len();
    if len != whole.len() && len != std::mem::offset_of!(InflightBody, padding) {
        return Err(Refusal::new(format!("Body of {len} bytes")));
    }
    whole[..len].copy_from_slice(&message.body);
    Ok(zerocopy::transmute!(whole))
}

/// The start of the body of `message`.
pub(super) fn body_prefix<T: FromBytes>(message: &Message) -> Result<T, Refusal> {
    T::read_from_prefix(&message.body)
        .map(|(value, _)| value)
        .map_err(|_| Refusal::new(format!("Body of {} bytes", message.body.len())))
}

/// The only file descriptor of `message`.
pub(super) fn single_fd(mut message: Message) -> Result<OwnedFd, Refusal> {
    match message.fds.pop() {
        Some(fd) if message.fds.is_empty() => Ok(fd),
        _ => Err(Refusal::new("One file has to come with it")),
    }
}

/// Head and payload of a configuration space message.
pub(super) fn config_message(message: &Message) -> Result<(ConfigHeader, &[u8]), Refusal> {
    let (header, payload) = ConfigHeader::ref_from_prefix(&message.body)
        .map_err(|_| Refusal::new(format!("Body of {} bytes", message.body.len())))?;
    if header.size as usize != payload.len() || payload.len() > MAX_CONFIG {
        return Err(Refusal::new(format!("{} bytes of configuration in {}", header.size, payload.len())));
    }
    Ok((*header, payload))
}
