//! Where probes come from.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use criu_hooks::inspect::Waiting;
use serde::{Deserialize, Serialize};

/// A range of addresses: `10.0.0.1`, `10.0.0.0/8`, `fd00::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Text that is no range of addresses.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is neither an address nor a prefix such as 10.0.0.0/24")]
pub struct NoPrefix(String);

impl FromStr for Prefix {
    type Err = NoPrefix;

    fn from_str(text: &str) -> Result<Self, NoPrefix> {
        let parse = || {
            let (address, length) = match text.split_once('/') {
                Some((address, length)) => (address, Some(length.parse().ok()?)),
                None => (text, None),
            };
            let address: IpAddr = address.parse().ok()?;
            let longest = if address.is_ipv4() { 32 } else { 128 };
            let length: u8 = length.unwrap_or(longest);
            (length <= longest).then_some(Self { address, length })
        };
        parse().ok_or_else(|| NoPrefix(text.to_owned()))
    }
}

impl TryFrom<String> for Prefix {
    type Error = NoPrefix;

    fn try_from(text: String) -> Result<Self, NoPrefix> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        format!("{}/{}", prefix.address, prefix.length)
    }
}

impl Prefix {
    fn contains(self, address: IpAddr) -> bool {
        let common = match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => (own.to_bits() ^ other.to_bits()).leading_zeros(),
            (IpAddr::V6(own), IpAddr::V6(other)) => (own.to_bits() ^ other.to_bits()).leading_zeros(),
            _ => return false,
        };
        common >= self.length.into()
    }
}

/// Where probes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sources {
    /// From the default gateways of the agent's network namespace: with a bridge or point-to-point CNI the node has
    /// these addresses, and its kubelet connects from them.
    Gateways,
    /// From these.
    Listed(Vec<Prefix>),
}

impl Sources {
    /// The addresses, for the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel's routes cannot be read.
    pub(super) fn addresses(&self) -> io::Result<Vec<Prefix>> {
        match self {
            Self::Listed(listed) => Ok(listed.clone()),
            Self::Gateways => {
                let mut found = ipv4_gateways(&fs::read_to_string("/proc/thread-self/net/route")?);
                // Not there where IPv6 is switched off.
                let ipv6 = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
                found.extend(ipv6_gateways(&ipv6));
                Ok(found.into_iter().map(Prefix::from).collect())
            }
        }
    }
}

impl From<IpAddr> for Prefix {
    fn from(address: IpAddr) -> Self {
        Self { address, length: if address.is_ipv4() { 32 } else { 128 } }
    }
}

/// Whether this client may be a probe. One that is in the agent's own network, as port-forwards, sidecars and this shim
/// itself are, never is.
pub(super) fn may_probe(sources: &[Prefix], client: Waiting) -> bool {
    let peer = client.peer.ip();
    peer != client.local.ip() && !peer.is_loopback() && sources.iter().any(|source| source.contains(peer))
}

/// The gateways of default routes in `/proc/net/route`.
fn ipv4_gateways(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| {
        // Interface, destination, gateway, flags, counts and metric, mask; addresses as the machine has them in memory.
        let fields: Vec<_> = line.split_whitespace().collect();
        let number = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok();
        let (destination, gateway, mask) = (number(1)?, number(2)?, number(7)?);
        (destination == 0 && mask == 0 && gateway != 0)
            .then(|| IpAddr::V4(Ipv4Addr::from(gateway.to_ne_bytes())))
    };
    table.lines().skip(1).filter_map(gateway).collect()
}

/// The gateways of default routes in `/proc/net/ipv6_route`.
fn ipv6_gateways(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| {
        // Destination and the length of its prefix, source and its, next hop, and more.
        let fields: Vec<_> = line.split_whitespace().collect();
        let number = |at: usize| u128::from_str_radix(fields.get(at)?, 16).ok();
        let (destination, length, gateway) = (number(0)?, number(1)?, number(4)?);
        (destination == 0 && length == 0 && gateway != 0).then(|| IpAddr::V6(Ipv6Addr::from(gateway)))
    };
    table.lines().filter_map(gateway).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn prefixes_contain_what_begins_like_them() {
        let contains = |own: &str, other: &str| prefix(own).contains(other.parse().unwrap());
        assert!(contains("10.1.2.0/24", "10.1.2.255"));
        assert!(!contains("10.1.2.0/24", "10.1.3.0"));
        assert!(contains("10.1.2.3", "10.1.2.3"));
        assert!(!contains("10.1.2.3", "10.1.2.2"));
        assert!(contains("0.0.0.0/0", "255.1.1.1"));
        assert!(!contains("0.0.0.0/0", "::1"));
        assert!(contains("fd00:1::/64", "fd00:1::ffff"));
        assert!(!contains("fd00:1::/64", "fd00:1:0:1::"));
        for wrong in ["", "10.0.0", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/-1", "node"] {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn default_gateways_are_found_in_the_kernels_tables() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t0100580A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            eth0\t0000580A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
            eth0\t00000A0A\t0200580A\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        assert_eq!(ipv4_gateways(table), ["10.88.0.1".parse::<IpAddr>().unwrap()]);
        let table = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
            fd000000000000000000000000000001 00000400 00000001 00000000 00000003 eth0\n\
            00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
            00000000000000000000000000000000 ffffffff 00000001 00000000 00200200 lo\n";
        assert_eq!(ipv6_gateways(table), ["fd00::1".parse::<IpAddr>().unwrap()]);
        assert_eq!((ipv4_gateways(""), ipv6_gateways("x y")), (Vec::new(), Vec::new()));
    }

    #[test]
    fn only_the_node_probes_and_nobody_inside_the_pod_does() {
        let sources = [prefix("10.88.0.0/16"), prefix("127.0.0.0/8"), prefix("fd00::1")];
        let may = |local: &str, peer: &str| {
            let (local, peer) =
                (format!("{local}:80").parse().unwrap(), format!("{peer}:9").parse().unwrap());
            may_probe(&sources, Waiting { local, peer })
        };
        assert!(may("10.88.0.5", "10.88.0.1"));
        assert!(may("[fd00::5]", "[fd00::1]"));
        assert!(!may("10.88.0.5", "10.89.0.1"));
        assert!(!may("10.88.0.5", "10.88.0.5"));
        assert!(!may("127.0.0.1", "127.0.0.2"));
    }
}
