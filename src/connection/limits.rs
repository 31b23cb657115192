//! How many connections there may be: in all, and per client.
//!
//! A permit for the whole edge is taken when a client is there but *before* it is accepted: at the limit clients
//! wait in the kernel's backlog instead of being accepted and refused. The limit per client can only be checked
//! after accepting. A permit that is dropped is given back, and so is a client's place. Either limit may change
//! while connections are open: no connection is cut, and no client is accepted until there are fewer connections
//! than the new limit allows.
//!
//! A client is an IPv4 address or an IPv6 /64, which is what one customer
//! gets; rates are not limited here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, getrlimit};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::process::memory::MemoryLimit;

/// Descriptors that are not connections: standard streams, tokio, the node's
/// sockets and state files, DERP and control connections, admin requests.
const RESERVED_DESCRIPTORS: u64 = 128;

/// The default limit is never higher than this.
const DEFAULT_CEILING: usize = 20_000;

/// Memory of one idle connection, and the memory that has to be there before the first.
const CONNECTION_BYTES: u64 = 10_000;
const PROGRAM_BYTES: u64 = 48 * 1024 * 1024;

/// The connection limit and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionLimit {
    /// How many connections there may be at once.
    pub connections: usize,
    /// The reason, for the log.
    pub reason: String,
}

/// Derives the limit from the descriptor limit of the process, one descriptor a connection, unless it is
/// configured lower. The default is also limited by the memory of idle connections. `listeners` is the number of
/// listening sockets.
pub fn connection_limit(
    configured: Option<usize>,
    listeners: usize,
    memory: &MemoryLimit,
) -> ConnectionLimit {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    limit_for(configured, listeners, descriptors, memory.bytes())
}

fn limit_for(
    configured: Option<usize>,
    listeners: usize,
    descriptors: u64,
    memory_bytes: u64,
) -> ConnectionLimit {
    let fitting = memory_bytes.saturating_sub(PROGRAM_BYTES) / CONNECTION_BYTES;
    let ceiling = usize::try_from(fitting).unwrap_or(usize::MAX).min(DEFAULT_CEILING);
    let free = descriptors.saturating_sub(RESERVED_DESCRIPTORS + listeners as u64);
    let free = usize::try_from(free).unwrap_or(usize::MAX).max(1);
    match configured {
        Some(wanted) if wanted > free => ConnectionLimit {
            connections: free,
            reason: format!(
                "max_connections = {wanted} lowered to what the descriptor limit of {descriptors} allows"
            ),
        },
        Some(wanted) => ConnectionLimit { connections: wanted, reason: "max_connections".into() },
        None if free > DEFAULT_CEILING && ceiling == DEFAULT_CEILING => ConnectionLimit {
            connections: ceiling,
            reason: "the default maximum; max_connections can raise it".into(),
        },
        None if free > ceiling => ConnectionLimit {
            connections: ceiling,
            reason: "as many as the memory limit allows; max_connections can raise it".into(),
        },
        None => ConnectionLimit { connections: free, reason: format!("descriptor limit of {descriptors}") },
    }
}

/// Permits whose number can change while some of them are taken.
#[derive(Debug)]
pub struct Permits {
    semaphore: Arc<Semaphore>,
    size: usize,
    /// How many taken permits are too many, and the task that waits for them.
    owed: Option<(usize, AbortOnDropHandle<()>)>,
}

impl Permits {
    /// Makes `size` permits, all of them free.
    pub fn new(size: usize) -> Permits {
        Permits { semaphore: Arc::new(Semaphore::new(size)), size, owed: None }
    }

    /// The semaphore that the permits are taken from.
    pub fn semaphore(&self) -> &Arc<Semaphore> {
        &self.semaphore
    }

    /// The configured number of permits.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Changes the number of permits. Taken permits that are now too many are removed as they come back, before
    /// anybody gets one who begins to wait after this call. The same number again changes nothing: the task that
    /// waits for owed permits keeps its place in the queue.
    pub async fn resize(&mut self, size: usize) {
        if size == self.size {
            return;
        }
        let mut existing = self.size;
        if let Some((short, waiting)) = self.owed.take() {
            waiting.abort();
            if waiting.await.is_err() {
                existing += short; // the task has given back the permits it had
            }
        }
        self.size = size;
        if size >= existing {
            return self.semaphore.add_permits(size - existing);
        }
        let surplus = existing - size;
        let short = surplus - self.semaphore.forget_permits(surplus);
        if short > 0 {
            self.owed = Some((short, self.await_return(short).await));
        }
    }

    /// Waits for these permits, ahead of everybody who comes later, to remove them.
    async fn await_return(&self, short: usize) -> AbortOnDropHandle<()> {
        let many = u32::try_from(short).unwrap_or(u32::MAX);
        let semaphore = Arc::clone(&self.semaphore);
        let (queued, is_queued) = tokio::sync::oneshot::channel();
        let waiting = tokio::spawn(async move {
            let mut returned = pin!(semaphore.acquire_many(many));
            let mut queued = Some(queued);
            let returned = std::future::poll_fn(|cx| {
                let poll = returned.as_mut().poll(cx);
                if let Some(queued) = queued.take() {
                    let _ = queued.send(());
                }
                poll
            });
            if let Ok(permits) = returned.await {
                permits.forget();
            }
        });
        let _ = is_queued.await;
        AbortOnDropHandle::new(waiting)
    }
}

/// Counts the connections of each client.
#[derive(Debug)]
pub struct ClientLimit {
    /// `limits.max_connections_per_client`; 0 is no limit.
    max: AtomicUsize,
    /// Open connections of each client.
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// The client is at its connection limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimitReached;

/// A client's place; dropping it gives the place back.
#[derive(Debug)]
pub struct ClientPermit {
    limit: Arc<ClientLimit>,
    client: IpAddr,
}

impl ClientLimit {
    /// At most `max` connections of one client at once; 0 is no limit.
    pub fn new(max: usize) -> Arc<ClientLimit> {
        Arc::new(ClientLimit { max: AtomicUsize::new(max), open: Mutex::default() })
    }

    /// Changes the limit, for connections to come.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    /// Takes a place for the client, unless the client is at its limit.
    pub fn admit(self: &Arc<Self>, client: IpAddr) -> Result<ClientPermit, ClientLimitReached> {
        let max = self.max.load(Ordering::Relaxed);
        let client = network_of(client);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = open.entry(client).or_default();
        if max != 0 && *connections >= max {
            return Err(ClientLimitReached);
        }
        *connections += 1;
        Ok(ClientPermit { limit: Arc::clone(self), client })
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let mut open = self.limit.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut entry) = open.entry(self.client) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// What counts as one client: the IPv4 address, or the /64 of an IPv6 address.
pub fn network_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_limit_bounds_the_default() {
        let limit = limit_for(None, 10, 1024, 256 << 20);
        assert_eq!(
            limit,
            ConnectionLimit { connections: 1024 - 128 - 10, reason: "descriptor limit of 1024".into() }
        );
    }

    #[test]
    fn a_huge_descriptor_limit_gives_the_ceiling() {
        assert_eq!(limit_for(None, 10, 1 << 20, 256 << 20).connections, DEFAULT_CEILING);
        assert_eq!(limit_for(None, 10, u64::MAX, 256 << 20).connections, DEFAULT_CEILING);
    }

    #[test]
    fn the_default_is_no_more_than_what_memory_has_room_for() {
        for (mib, connections) in [(64, 1677), (128, 8388), (256, DEFAULT_CEILING)] {
            let limit = limit_for(None, 10, 1 << 20, mib << 20);
            assert_eq!(limit.connections, connections, "{}", limit.reason);
            assert_eq!(limit.reason.contains("memory limit"), connections != DEFAULT_CEILING);
        }
        assert_eq!(limit_for(Some(9000), 10, 1 << 20, 64 << 20).connections, 9000, "who says so may");
    }

    #[test]
    fn a_configured_limit_holds_unless_descriptors_are_missing() {
        assert_eq!(limit_for(Some(500), 10, 1 << 20, 256 << 20).connections, 500);
        assert_eq!(limit_for(Some(50_000), 10, 1 << 20, 256 << 20).connections, 50_000);
        let lowered = limit_for(Some(50_000), 10, 1024, 256 << 20);
        assert_eq!(lowered.connections, 886);
        assert!(lowered.reason.contains("lowered"), "{}", lowered.reason);
    }

    #[test]
    fn there_is_always_a_permit() {
        assert_eq!(limit_for(Some(1), 10, 1024, 256 << 20).connections, 1);
        assert_eq!(limit_for(None, 10, 64, 256 << 20).connections, 1);
    }

    #[test]
    fn a_client_is_admitted_up_to_its_limit_and_again_after_leaving() {
        let limit = ClientLimit::new(2);
        let client = "192.0.2.7".parse().unwrap();
        let first = limit.admit(client).unwrap();
        let second = limit.admit(client).unwrap();
        assert_eq!(limit.admit(client).unwrap_err(), ClientLimitReached);
        assert!(limit.admit("192.0.2.8".parse().unwrap()).is_ok());
        drop(first);
        let _third = limit.admit(client).unwrap();
        assert_eq!(limit.admit(client).unwrap_err(), ClientLimitReached);
        drop(second);
        assert!(limit.admit(client).is_ok());
    }

    #[test]
    fn an_ipv6_client_is_its_64_and_a_mapped_one_its_ipv4_address() {
        let limit = ClientLimit::new(1);
        let _one = limit.admit("2001:db8::1".parse().unwrap()).unwrap();
        assert!(limit.admit("2001:db8::2".parse().unwrap()).is_err());
        assert!(limit.admit("2001:db8:0:1::1".parse().unwrap()).is_ok());
        let _four = limit.admit("192.0.2.7".parse().unwrap()).unwrap();
        assert!(limit.admit("::ffff:192.0.2.7".parse().unwrap()).is_err());
    }

    #[test]
    fn a_clients_limit_may_change_while_it_is_there() {
        let limit = ClientLimit::new(3);
        let client = "192.0.2.7".parse().unwrap();
        let _three = [(); 3].map(|()| limit.admit(client).unwrap());
        limit.set_max(2);
        assert!(limit.admit(client).is_err());
        limit.set_max(4);
        let _fourth = limit.admit(client).unwrap();
        assert!(limit.admit(client).is_err());
    }

    #[tokio::test]
    async fn permits_that_are_out_and_too_many_do_not_come_back() {
        let mut permits = Permits::new(5);
        let semaphore = Arc::clone(permits.semaphore());
        let mut out: Vec<_> = (0..4).map(|_| semaphore.try_acquire().unwrap()).collect();
        permits.resize(2).await;
        assert_eq!((permits.size(), semaphore.available_permits()), (2, 0));
        let later = tokio::spawn({
            let semaphore = Arc::clone(&semaphore);
            async move { semaphore.acquire_owned().await.unwrap() }
        });
        tokio::task::yield_now().await;
        permits.resize(2).await;
        out.truncate(2);
        tokio::task::yield_now().await;
        assert!(!later.is_finished(), "two are out, and two there may be");
        out.clear();
        drop(later.await.unwrap());
        assert_eq!(semaphore.available_permits(), 2);
    }

    #[tokio::test]
    async fn the_number_of_permits_goes_up_and_down_whatever_is_out() {
        let mut permits = Permits::new(3);
        let semaphore = Arc::clone(permits.semaphore());
        let mut out: Vec<_> = (0..3).map(|_| semaphore.try_acquire().unwrap()).collect();
        for size in [0, 2, 1, 7, 3, 1, 2] {
            permits.resize(size).await;
            assert_eq!(semaphore.available_permits(), size.saturating_sub(3), "at {size} with three out");
        }
        out.pop();
        tokio::task::yield_now().await;
        assert_eq!(semaphore.available_permits(), 0, "the first one back is owed");
        out.clear();
        tokio::task::yield_now().await;
        assert_eq!(semaphore.available_permits(), 2);
    }

    #[test]
    fn nothing_is_kept_of_clients_that_left() {
        let limit = ClientLimit::new(0);
        for last in 0..=255 {
            drop(limit.admit(IpAddr::from([192, 0, 2, last])).unwrap());
        }
        assert!(limit.open.lock().unwrap().is_empty());
    }
}
