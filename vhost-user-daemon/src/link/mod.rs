//! The front end's connection: relays to the stock `VhostUserDaemon`, and answers itself what the stock crates refuse.
//!
//! ```text
//! front end <── socket ──> Link ──> private socket ──> VhostUserDaemon
//!                           └ protocol features, configuration space, dirty log, chains in flight, backend channel
//! ```
//!
//! The stock crates close the connection at the first request that fails, also when a guest can provoke it. The link
//! therefore checks what it relays, asks for an acknowledgement of every message, and turns a refusal into the error
//! acknowledgement of the vhost-user text (section "Communication", `VHOST_USER_PROTOCOL_F_REPLY_ACK`).

mod channel;
mod inner;
mod memory;
mod message;
mod wire;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};

use log::debug;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::process::Pid;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as ProtocolFeatures, VhostUserVirtioFeatures};
use zerocopy::{FromBytes, IntoBytes};

pub use self::channel::ConfigNotifier;
pub(crate) use self::inner::pair;
use self::message::{
    ConfigHeader, InflightBody, LogBase, NO_FD, Refusal, VringState, body, body_prefix, config_message,
    inflight_body, request, request_name, single_fd, takes_files,
};
use self::wire::Message;
use crate::device::{Device, SharedRegion};
use crate::dirty::DirtyLog;
use crate::inflight::{self, InflightMemory};
use crate::ring::SharedInflight;
use crate::{info_limited, warn_limited};

/// Protocol features that the link serves by itself.
const OWN_PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::REPLY_ACK
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::BACKEND_REQ);

/// Those of network devices.
const NETWORK_PROTOCOL_FEATURES: ProtocolFeatures = ProtocolFeatures::RARP.union(ProtocolFeatures::MTU);

/// What the link says to a request.
enum Answer {
    /// The reply that belongs to this request.
    Reply(Vec<u8>),
    /// The same with a file.
    ReplyWithFile(Vec<u8>, OwnedFd),
    /// Done: acknowledged if the front end asked for that.
    Done,
}

/// The front end's side of one connection.
pub(crate) struct Link<D: Device> {
    front: UnixStream,
    inner: UnixStream,
    device: Arc<D>,
    log: Arc<DirtyLog>,
    inflight: SharedInflight,
    notifier: ConfigNotifier,
    nudge: Box<dyn Fn(usize) + Send>,
    disable: Box<dyn Fn(usize) + Send>,
    features: u64,
    protocol_features: ProtocolFeatures,
    acked_protocol_features: ProtocolFeatures,
    /// What the driver took at last: firmware takes less than the system after it.
    acked_features: u64,
    /// The memory regions of the moment, as bodies of `ADD_MEM_REG`.
    regions: Vec<Vec<u8>>,
    /// `SET_FEATURES` was relayed, so that the stock crates accept `SET_VRING_ENABLE`.
    features_set: bool,
    /// `SET_OWNER` was relayed; the stock crates refuse a second one.
    owned: bool,
    /// The device status of the virtio text, section 2.1, as the front end last set it.
    status: u8,
    /// Which rings are enabled.
    enabled: Vec<bool>,
    /// Which rings have a kick.
    started: Vec<bool>,
    /// What to enable once the features are set: DPDK and QEMU 8.2 send `SET_VRING_ENABLE` before.
    early_enables: Vec<VringState>,
}

/// What a [`Link`] is made of.
pub(crate) struct LinkParts<D> {
    /// The front end's socket.
    pub front: UnixStream,
    /// The private socket of the stock daemon.
    pub inner: UnixStream,
    /// Answers for features and configuration space.
    pub device: Arc<D>,
    /// The dirty log that the front end sets up.
    pub log: Arc<DirtyLog>,
    /// The memory for chains in flight that the front end keeps.
    pub inflight: SharedInflight,
    /// The device's way to the front end.
    pub notifier: ConfigNotifier,
    /// Makes the worker of a queue look at it again.
    pub nudge: Box<dyn Fn(usize) + Send>,
    /// Called before a queue is disabled.
    pub disable: Box<dyn Fn(usize) + Send>,
}

impl<D: Device> Link<D> {
    /// Joins the front end to the stock daemon.
    pub fn new(parts: LinkParts<D>) -> Self {
        let LinkParts { front, inner, device, log, inflight, notifier, nudge, disable } = parts;
        Self {
            front,
            inner,
            enabled: vec![false; device.num_queues()],
            started: vec![false; device.num_queues()],
            device,
            log,
            inflight,
            notifier,
            nudge,
            disable,
            features: 0,
            acked_features: 0,
            regions: Vec::new(),
            protocol_features: ProtocolFeatures::empty(),
            acked_protocol_features: ProtocolFeatures::empty(),
            features_set: false,
            owned: false,
            status: 0,
            early_enables: Vec::new(),
        }
    }

    /// Serves the front end until it leaves, which is no error.
    pub fn run(mut self) -> io::Result<()> {
        let result = self.greet().and_then(|()| self.serve());
        self.log.set_enabled(false);
        self.notifier.close();
        result
    }

    /// Agrees with the stock daemon on all that it can do. What the front end takes of it is the link's business.
    fn greet(&mut self) -> io::Result<()> {
        self.features = self.ask_inner(&Message::new(request::GET_FEATURES, []))?;
        let inner: u64 = self.ask_inner(&Message::new(request::GET_PROTOCOL_FEATURES, []))?;
        let inner = ProtocolFeatures::from_bits_truncate(inner);
        self.protocol_features = inner | OWN_PROTOCOL_FEATURES;
        if self.device.network().is_some() {
            self.protocol_features |= NETWORK_PROTOCOL_FEATURES;
        }
        if !self.device.keeps_order() {
            self.protocol_features |= ProtocolFeatures::INFLIGHT_SHMFD;
        }
        self.relay(Message::new(request::SET_PROTOCOL_FEATURES, inner.bits().as_bytes()))
            .map_err(|refusal| io::Error::other(refusal.reason))
    }

    fn serve(&mut self) -> io::Result<()> {
        while let Some(message) = Message::receive(&self.front)? {
            let (request, need_reply) = (message.request, message.need_reply);
            debug!("Message {request} of {} bytes, {} files", message.body.len(), message.fds.len());
            let has_reply = matches!(
                request,
                request::GET_FEATURES
                    | request::GET_PROTOCOL_FEATURES
                    | request::GET_QUEUE_NUM
                    | request::GET_VRING_BASE
                    | request::GET_CONFIG
                    | request::GET_MAX_MEM_SLOTS
                    | request::SET_LOG_BASE
                    | request::GET_STATUS
                    | request::GET_INFLIGHT_FD
            );
            let reply_to = Message::new(request, []);
            let refusal = match self.answer(message) {
                Ok(Answer::Reply(body)) => {
                    reply_to.reply(&self.front, &body, &[])?;
                    continue;
                }
                Ok(Answer::ReplyWithFile(body, file)) => {
                    reply_to.reply(&self.front, &body, &[file])?;
                    continue;
                }
                Ok(Answer::Done) => None,
                Err(refusal) => Some(refusal),
            };
            if let Some(Refusal { reason, .. }) = &refusal {
                warn_limited!("Message {} of the front end is refused: {reason}", request_name(request));
            }
            // There is no way to say no to a request that has a reply of its own.
            if !has_reply && need_reply && self.acked_protocol_features.contains(ProtocolFeatures::REPLY_ACK)
            {
                reply_to.reply(&self.front, u64::from(refusal.is_some()).as_bytes(), &[])?;
            }
            if let Some(Refusal { reason, fatal }) = refusal
                && (fatal || has_reply)
            {
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
        }
        Ok(())
    }

    /// What the device says to memory regions of this front end.
    fn may_share(&self) -> impl Fn(&[SharedRegion<'_>]) -> Result<(), String> + '_ {
        // 0 is a process of another PID namespace, for which rustix has no value.
        let peer = getsockopt(&self.front, PeerCredentials).ok().and_then(|peer| Pid::from_raw(peer.pid()));
        move |regions| self.device.check_memory(regions, peer)
    }

    fn answer(&mut self, mut message: Message) -> Result<Answer, Refusal> {
        if !takes_files(message.request) {
            // Closed, not used: the stock crates would close the connection.
            message.fds.clear();
        }
        match message.request {
            request::GET_FEATURES => self.get_features(),
            request::SET_FEATURES => self.set_features(&message),
            request::GET_PROTOCOL_FEATURES => {
                Ok(Answer::Reply(self.protocol_features.bits().as_bytes().into()))
            }
            request::SET_PROTOCOL_FEATURES => {
                let acked = body::<u64>(&message)?;
                if acked & !self.protocol_features.bits() != 0 {
                    return Err(Refusal::new(format!("Protocol features {acked:#x} were not all offered")));
                }
                self.acked_protocol_features = ProtocolFeatures::from_bits_truncate(acked);
                Ok(Answer::Done)
            }
            // RESET_OWNER is not used any more says the text, and its effects are those of the end of the connection.
            // SET_LOG_FD is a gap of vhost: not known. It brings an eventfd for errors of logging, of which there are
            // none here, and no front end waits for it.
            request::RESET_OWNER | request::SET_LOG_FD => Ok(Answer::Done),
            // QEMU keeps the connection when a device is unplugged; with the next one it starts from nothing.
            request::SET_OWNER if self.owned => self.forget_memory(),
            request::SET_OWNER => {
                self.owned = true;
                self.relay(message).map(|()| Answer::Done)
            }
            request::GET_QUEUE_NUM => Ok(Answer::Reply((self.device.num_queues() as u64).as_bytes().into())),
            request::GET_CONFIG => self.get_config(&message),
            request::SET_CONFIG => self.set_config(&message),
            // Gap of vhost-user-backend: its dirty log costs every request, cannot be switched off again, and loses
            // regions that are added.
            request::SET_LOG_BASE => self.set_log_base(message),
            // Gap of vhost-user-backend: it has no memory for chains in flight.
            request::GET_INFLIGHT_FD if !self.device.keeps_order() => self.get_inflight(&message),
            request::SET_INFLIGHT_FD if !self.device.keeps_order() => self.set_inflight(message),
            // Gap of vhost: neither is known.
            request::SEND_RARP => self.send_rarp(&message),
            request::NET_SET_MTU => self.net_set_mtu(&message),
            // Gap of vhost: its channel cannot send CONFIG_CHANGE_MSG.
            request::SET_BACKEND_REQ_FD => self.set_backend_channel(message),
            // Gap of vhost: not known. A front end without this feature stops and starts the rings all the same, so the
            // status is kept for it and nothing hangs on it.
            request::SET_STATUS => {
                let status = body::<u64>(&message)?;
                self.status =
                    u8::try_from(status).map_err(|_| Refusal::new(format!("Status {status:#x}")))?;
                Ok(Answer::Done)
            }
            request::GET_STATUS => Ok(Answer::Reply(u64::from(self.status).as_bytes().into())),
            request::SET_VRING_NUM => {
                let VringState { index, num } = body(&message)?;
                self.check_queue(index)?;
                // Gap of virtio-queue: it acknowledges a size that it does not take.
                if !num.is_power_of_two() || num > self.device.max_queue_size().into() {
                    return Err(Refusal::new(format!("Queue of {num} descriptors")));
                }
                self.relay(message).map(|()| Answer::Done)
            }
            request::SET_VRING_ADDR if self.regions.is_empty() => Err(Refusal::new(
                "The front end has not shared the guest's memory (QEMU: a memory backend with share=on)",
            )),
            request::SET_VRING_ADDR | request::SET_VRING_BASE => {
                self.check_queue(body_prefix::<u32>(&message)?)?;
                self.relay(message).map(|()| Answer::Done)
            }
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                self.set_vring_file(message)
            }
            request::SET_VRING_ENABLE => self.set_vring_enable(&message),
            request::GET_VRING_BASE => {
                let VringState { index, .. } = body(&message)?;
                self.check_queue(index)?;
                self.stop_ring(index).map(Answer::Reply)
            }
            request::GET_MAX_MEM_SLOTS => self.relay_for_reply(&message).map(Answer::Reply),
            // Gap of vhost: it wants at least one.
            request::SET_MEM_TABLE if body_prefix::<u32>(&message)? == 0 => self.forget_memory(),
            request::SET_MEM_TABLE => {
                let (message, regions) = memory::table(&message, &self.may_share())?;
                self.relay(message)?;
                self.regions = regions;
                Ok(Answer::Done)
            }
            request::ADD_MEM_REG => {
                memory::check_added(&message, &self.may_share())?;
                let region = message.body.clone();
                self.relay(message)?;
                self.regions.push(region);
                Ok(Answer::Done)
            }
            request::REM_MEM_REG => {
                let region = message.body.clone();
                self.relay(message)?;
                self.regions.retain(|known| !memory::is_same(known, &region));
                Ok(Answer::Done)
            }
            request::RESET_DEVICE => self.reset_device(message),
            _ => Err(Refusal::new("It is not known, or belongs to a feature that is not offered")),
        }
    }

    fn forget_memory(&mut self) -> Result<Answer, Refusal> {
        for region in std::mem::take(&mut self.regions) {
            self.relay(Message::new(request::REM_MEM_REG, region))?;
        }
        Ok(Answer::Done)
    }

    fn set_vring_file(&mut self, message: Message) -> Result<Answer, Refusal> {
        let value = body::<u64>(&message)?;
        let index = (value & 0xff) as u32;
        self.check_queue(index)?;
        if (value & NO_FD == 0) != (message.fds.len() == 1) {
            return Err(Refusal::new(format!("Ring message with {} files", message.fds.len())));
        }
        if message.request == request::SET_VRING_KICK && self.enabled[index as usize] {
            // Gap of vhost-user-backend: it looks at the new eventfd only when a ring starts.
            self.enable_ring(index, false)?;
            self.started[index as usize] = true;
            self.relay(message)?;
            return self.enable_ring(index, true).map(|()| Answer::Done);
        }
        self.started[index as usize] |= message.request == request::SET_VRING_KICK;
        self.relay(message).map(|()| Answer::Done)
    }

    fn reset_device(&mut self, message: Message) -> Result<Answer, Refusal> {
        self.relay(message)?;
        // Gap of vhost-user-backend: a ring that was reset would go on with its old addresses when it is enabled.
        self.stop_rings()?;
        self.features_set = false;
        self.enabled.fill(false);
        self.status = 0;
        self.log.set_enabled(false);
        Ok(Answer::Done)
    }

    fn stop_rings(&mut self) -> Result<(), Refusal> {
        for index in 0..self.device.num_queues() as u32 {
            self.stop_ring(index)?;
        }
        Ok(())
    }

    /// Stops a ring, and returns the reply to the message that does so.
    fn stop_ring(&mut self, index: u32) -> Result<Vec<u8>, Refusal> {
        // A front end that stops one ring mostly is about to stop all.
        self.notifier.stop();
        self.started[index as usize] = false;
        let state = VringState { index, num: 0 };
        self.relay_for_reply(&Message::new(request::GET_VRING_BASE, state.as_bytes()))
    }

    fn get_features(&mut self) -> Result<Answer, Refusal> {
        // User Mode Linux has no GET_VRING_BASE, and without the bit no SET_VRING_ENABLE either. When its driver goes, it
        // only asks this once more, as a barrier, and the memory of the rings is used for other things then.
        let can_disable = self.acked_features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        if self.features_set && !can_disable {
            self.stop_rings()?;
        }
        Ok(Answer::Reply(self.features.as_bytes().into()))
    }

    fn set_features(&mut self, message: &Message) -> Result<Answer, Refusal> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let acked = body::<u64>(message)?;
        if acked & !self.features != 0 {
            return Err(Refusal::new(format!("Features {:#x} were not offered", acked & !self.features)));
        }
        // Gap of vhost: SET_VRING_ENABLE is refused when this bit is not acknowledged. The link keeps the bit set, and
        // enables the rings itself, as the text demands for a front end without it. (User Mode Linux sets the features
        // a second time, and forgets the bit.)
        self.relay(Message::new(request::SET_FEATURES, (acked | protocol).as_bytes()))?;
        if self.acked_features != acked {
            info_limited!("The driver took features {acked:#x} of {:#x}", self.features);
        }
        self.acked_features = acked;
        self.features_set = true;
        self.log.set_enabled(acked & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        let mut enables = std::mem::take(&mut self.early_enables);
        if acked & protocol == 0 {
            enables =
                (0..self.device.num_queues() as u32).map(|index| VringState { index, num: 1 }).collect();
        }
        for state in enables {
            self.enable_ring(state.index, state.num == 1)?;
        }
        Ok(Answer::Done)
    }

    fn set_vring_enable(&mut self, message: &Message) -> Result<Answer, Refusal> {
        let state = body::<VringState>(message)?;
        self.check_queue(state.index)?;
        if state.num > 1 {
            return Err(Refusal::new(format!("Ring enabled with {}", state.num)));
        }
        if self.features_set {
            return self.enable_ring(state.index, state.num == 1).map(|()| Answer::Done);
        }
        self.early_enables.retain(|early| early.index != state.index);
        self.early_enables.push(state);
        Ok(Answer::Done)
    }

    fn enable_ring(&mut self, index: u32, enable: bool) -> Result<(), Refusal> {
        let state = VringState { index, num: enable.into() };
        self.enabled[index as usize] = enable;
        let is_running =
            self.enabled.iter().zip(&self.started).any(|(enabled, started)| *enabled && *started);
        if !is_running {
            self.notifier.stop();
        }
        if !enable {
            (self.disable)(index as usize);
        }
        self.relay(Message::new(request::SET_VRING_ENABLE, state.as_bytes()))?;
        if !enable {
            // The stock crates tell a worker only of the contrary.
            (self.nudge)(index as usize);
        } else if is_running {
            // By this feature QEMU is known, which needs it. Others may take a part of a message for an error, or lose it,
            // as User Mode Linux does.
            self.notifier.start(self.acked_protocol_features.contains(ProtocolFeatures::STATUS));
        }
        Ok(())
    }

    fn send_rarp(&self, message: &Message) -> Result<Answer, Refusal> {
        let network = self.device.network().ok_or_else(|| Refusal::new("This is no network device"))?;
        // An address in the first six bytes of a 64-bit field.
        body::<u64>(message)?;
        network.announce(body_prefix(message)?);
        Ok(Answer::Done)
    }

    fn net_set_mtu(&self, message: &Message) -> Result<Answer, Refusal> {
        let network = self.device.network().ok_or_else(|| Refusal::new("This is no network device"))?;
        let mtu = body::<u64>(message)?;
        let mtu = u16::try_from(mtu).map_err(|_| Refusal::new(format!("MTU of {mtu} bytes")))?;
        network.set_mtu(mtu).map(|()| Answer::Done).map_err(Refusal::new)
    }

    fn get_config(&self, message: &Message) -> Result<Answer, Refusal> {
        let Ok((header, payload)) = config_message(message) else {
            // No payload says no, in the words of the text.
            let header = ConfigHeader { size: 0, ..body_prefix(message)? };
            return Ok(Answer::Reply(header.as_bytes().into()));
        };
        let mut reply = header.as_bytes().to_vec();
        let start = reply.len();
        reply.resize(start + payload.len(), 0);
        self.device.read_config(header.offset as usize, &mut reply[start..]);
        Ok(Answer::Reply(reply))
    }

    fn set_config(&self, message: &Message) -> Result<Answer, Refusal> {
        let (header, payload) = config_message(message)?;
        if self.device.write_config(header.offset as usize, payload) {
            return Ok(Answer::Done);
        }
        Err(Refusal::new(format!("{} bytes at {} of the configuration space", header.size, header.offset)))
    }

    fn set_log_base(&self, message: Message) -> Result<Answer, Refusal> {
        let base = body::<LogBase>(&message)?;
        let echo = message.body.clone();
        let fd = single_fd(message)?;
        self.log
            .set_base(fd.into(), base.offset, base.size)
            .map_err(|error| Refusal::new(format!("Dirty log cannot be mapped: {error}")))?;
        // The text demands a reply and does not say what is in it. QEMU takes anything, the crate vhost this.
        Ok(Answer::Reply(echo))
    }

    fn get_inflight(&self, message: &Message) -> Result<Answer, Refusal> {
        let wanted = inflight_body(message)?;
        if usize::from(wanted.num_queues) > self.device.num_queues()
            || wanted.queue_size > self.device.max_queue_size()
        {
            return Err(Refusal::new(format!("{} queues of {}", wanted.num_queues, wanted.queue_size)));
        }
        let (file, mmap_size) = inflight::create(wanted.num_queues, wanted.queue_size)
            .map_err(|error| Refusal::new(format!("Memory for chains in flight: {error}")))?;
        let reply = InflightBody { mmap_size, mmap_offset: 0, ..wanted };
        Ok(Answer::ReplyWithFile(reply.as_bytes()[..message.body.len()].into(), file))
    }

    fn set_inflight(&self, message: Message) -> Result<Answer, Refusal> {
        let InflightBody { mmap_size, mmap_offset, num_queues, queue_size, .. } = inflight_body(&message)?;
        let memory =
            InflightMemory::adopt(single_fd(message)?, mmap_size, mmap_offset, num_queues, queue_size)
                .map_err(|error| Refusal::new(format!("Memory for chains in flight: {error}")))?;
        // Taken up by each ring when it starts.
        *self.inflight.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(memory));
        Ok(Answer::Done)
    }

    fn set_backend_channel(&self, message: Message) -> Result<Answer, Refusal> {
        let stream = UnixStream::from(single_fd(message)?);
        // A front end that does not read must not hold up whoever wants to tell it something. This also fails for
        // what is no socket.
        stream
            .set_nonblocking(true)
            .and_then(|()| stream.peer_addr().map(drop))
            .map_err(|error| Refusal::new(format!("Backend channel is no connected socket: {error}")))?;
        let opened = self.notifier.open(stream);
        opened.map(|()| Answer::Done).map_err(|error| Refusal::new(format!("No thread for it: {error}")))
    }

    fn check_queue(&self, index: u32) -> Result<(), Refusal> {
        let count = self.device.num_queues();
        if (index as usize) < count {
            return Ok(());
        }
        Err(Refusal::new(format!(
            "Queue {index} does not exist: the device has {count} (raise {}, or have the front end ask for fewer)",
            self.device.queues_flag()
        )))
    }

    /// Hands `message` to the stock daemon and waits until it is done.
    fn relay(&self, mut message: Message) -> Result<(), Refusal> {
        message.need_reply = true;
        match self.ask_inner::<u64>(&message) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Refusal::fatal("It does not fit what came before it")),
            Err(error) => Err(Refusal::fatal(format!("The daemon has closed the connection: {error}"))),
        }
    }

    /// Hands over a `message` that has a reply of its own.
    fn relay_for_reply(&self, message: &Message) -> Result<Vec<u8>, Refusal> {
        let reply = message.send(&self.inner).and_then(|()| Message::receive(&self.inner));
        match reply {
            Ok(Some(reply)) => Ok(reply.body),
            Ok(None) => Err(Refusal::fatal("It does not fit what came before it")),
            Err(error) => Err(Refusal::fatal(format!("The daemon has closed the connection: {error}"))),
        }
    }

    fn ask_inner<T: FromBytes>(&self, message: &Message) -> io::Result<T> {
        message.send(&self.inner)?;
        Message::receive(&self.inner)?
            .and_then(|reply| reply.body_as())
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}
