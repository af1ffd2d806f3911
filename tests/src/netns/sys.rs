//! The system calls on taps and packet sockets that no crate here wraps.
#![expect(unsafe_code, reason = "ioctls on taps, and the addresses and batches of packet sockets")]

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `TUNSETIFF`: makes an open `/dev/net/tun` a queue of the interface `name`.
pub(super) fn tun_set_iff(tun: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid request.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The name ends with a zero byte inside the array.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other(format!("{name} is too long for an interface")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request is valid for the call, which writes nothing behind it.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(())
}

/// `TUNSETVNETHDRSZ`: the size of the virtio-net header of a tap's frames.
pub(super) fn tun_set_header_len(tun: BorrowedFd<'_>, len: libc::c_int) -> io::Result<()> {
    // SAFETY: the call reads one int.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const len) })?;
    Ok(())
}

/// A packet socket bound to the interface of this index, with virtio-net headers of 10 bytes.
pub(super) fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    // Bound to no protocol yet, or it would receive from all interfaces at once.
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the call succeeded, so the descriptor is new and ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: libc::c_int = 1;
    // SAFETY: the option is one int.
    check(unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of_val(&on) as u32,
        )
    })?;
    // SAFETY: all-zero bytes are a valid address.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: the address is valid for the call and has this length.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) })?;
    Ok(socket)
}

/// Receives one packet without waiting; returns its length, and whether the interface sent it (rather than received).
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut address = MaybeUninit::<libc::sockaddr_ll>::zeroed();
    let mut len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the buffer and the address are valid for writes of the lengths given.
    let received = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
            address.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes were zero, which is a valid address, and the call wrote a valid one over it.
    let address = unsafe { address.assume_init() };
    Ok((received as usize, address.sll_pkttype == libc::PACKET_OUTGOING))
}

/// Sends a batch of packets with as few calls as possible; returns how many were taken.
pub(super) fn send_many(socket: BorrowedFd<'_>, packets: &[&[u8]]) -> io::Result<usize> {
    let mut parts: Vec<libc::iovec> = packets
        .iter()
        .map(|packet| libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = parts
        .iter_mut()
        .map(|part| {
            // SAFETY: all-zero bytes are a valid message.
            let mut message: libc::mmsghdr = unsafe { zeroed() };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    // SAFETY: each message points to one part, each part to one packet, and all of them outlive the call, which only
    // reads from the packets.
    let sent = check(unsafe {
        libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, libc::MSG_DONTWAIT)
    })?;
    Ok(sent as usize)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
