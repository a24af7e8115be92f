//! Ports that closed connections keep from a listener.
//!
//! What is left of a closed connection lingers in the kernel for a minute or two. It keeps its port from every new
//! listener, unless both have SO_REUSEADDR; what has ended cannot be given that any more. But the kernel does not look who
//! has a port when the last socket that bound it was of the same group (SO_REUSEPORT and one owner), at an address
//! that includes the new one's. A socket under repair (TCP_REPAIR, which CRIU needs, too) may bind a port in any case. So
//! such a socket binds it at all addresses, just for a moment: the kernel remembers that as long as somebody else has the
//! port, as the shim has by its duplicate of the listener.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};

use super::options;

/// Lets sockets of this process's user that have SO_REUSEPORT bind the TCP port `port` of the calling thread's network
/// namespace, whatever lingers there, as long as some socket is bound to it.
pub(super) fn open(port: u16) -> io::Result<()> {
    let open = |family, address: SocketAddr| -> io::Result<()> {
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        options::force_bind(&socket)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        if family == AddressFamily::INET6 {
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        Ok(net::bind(&socket, &address)?)
    };
    match open(AddressFamily::INET6, (Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error()) => {
            open(AddressFamily::INET, (Ipv4Addr::UNSPECIFIED, port).into())
        }
        opened => opened,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::Read as _,
        net::{TcpListener, TcpStream},
        os::fd::OwnedFd,
    };

    use super::*;

    /// A socket as CRIU makes it for a listener: of IPv6 alone where it can.
    fn restored(at: SocketAddr) -> io::Result<OwnedFd> {
        let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        if at.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        net::bind(&socket, &at)?;
        net::listen(&socket, 1)?;
        Ok(socket)
    }

    /// A listener without SO_REUSEADDR of which a closed connection lingers.
    fn used(address: &str) -> Option<TcpListener> {
        let at: SocketAddr = address.parse().unwrap();
        let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        net::bind(&socket, &at).ok()?;
        net::listen(&socket, 1).unwrap();
        let listener = TcpListener::from(socket);
        let port = listener.local_addr().unwrap().port();
        let local: SocketAddr = if at.is_ipv4() {
            (Ipv4Addr::LOCALHOST, port).into()
        } else {
            (Ipv6Addr::LOCALHOST, port).into()
        };
        let mut client = TcpStream::connect(local).unwrap();
        drop(listener.accept().unwrap());
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop(client);
        // What the shim does with its duplicate.
        sockopt::set_socket_reuseport(&listener, true).unwrap();
        Some(listener)
    }

    #[test]
    fn what_lingers_keeps_a_port_from_a_new_listener_until_it_is_opened() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("to repair sockets is for root");
            return;
        }
        for address in ["0.0.0.0:0", "127.0.0.1:0", "[::]:0", "[::1]:0"] {
            let Some(listener) = used(address) else { continue };
            let at = listener.local_addr().unwrap();
            let refused = restored(at).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::ADDRINUSE.raw_os_error()), "{address}: {refused}");
            open(at.port()).unwrap();
            // Again and again: a restore may fail.
            for _ in 0..3 {
                restored(at).unwrap_or_else(|error| panic!("{address}: {error}"));
            }
        }
    }
}
